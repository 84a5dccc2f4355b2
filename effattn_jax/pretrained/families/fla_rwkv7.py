"""RWKV-7 (Peng et al. 2025, arXiv:2503.14456) as flash-linear-attention stores it."""

from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla, fla_rwkv
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import shaped

DEFAULTS = {
    **fla_rwkv.COMMON,
    "head_dim": 64,
    "num_heads": None,
    "value_dim": None,
    "decay_low_rank_dim": 64,
    "gate_low_rank_dim": 128,
    "a_low_rank_dim": 64,
    "v_low_rank_dim": 16,
}


def full(config: Config) -> dict[str, Any]:
    return {**DEFAULTS, **config}


def options(config: Config) -> dict[str, Any]:
    """The GroupNorm's eps grows with the size of a head, here only."""
    config = full(config)
    fla.supported(config, fla_rwkv.ONLY)
    dim, value_dim = config["hidden_size"], config["value_dim"]
    if value_dim not in (None, dim) and any(size != dim for size in value_dim):
        checks.fail("value_dim", value_dim, f"hidden_size = {dim} in all blocks")
    head_dim = config["head_dim"] or dim // config["num_heads"]
    mixer = {
        "head_dim": head_dim,
        "decay_rank": config["decay_low_rank_dim"],
        "rate_rank": config["a_low_rank_dim"],
        "value_rank": config["v_low_rank_dim"],
        "gate_rank": config["gate_low_rank_dim"],
        "norm_eps": head_dim * config["norm_eps"],
    }
    return fla_rwkv.options(config, "rwkv7", mixer)


def lora(below: str, name: str, bias: bool = True) -> list[Entry]:
    return [*linear(f"{below}.0", f"mixer.{name}.down"), *linear(f"{below}.2", f"mixer.{name}.up", bias=bias)]


def time_mix(below: str, block: int) -> Sequence[Entry]:
    row = shaped(lambda shape: (1, 1, *shape))
    return [
        *(Entry(f"{below}.x_{c}", (f"mixer.mu_{c}",), row) for c in "rwkvag"),
        *(entry for name in ("k_k", "k_a", "r_k") for entry in same(f"{below}.{name}", f"mixer.{name}")),
        *(entry for c in "rkv" for entry in linear(f"{below}.{c}_proj", f"mixer.{c}_proj")),
        *lora(f"{below}.w_lora.lora", "w_proj"),
        *lora(f"{below}.a_lora.lora", "a_proj"),
        *(lora(f"{below}.v_lora.lora", "v_mix") if block else []),
        *lora(f"{below}.g_lora.lora", "g_proj", bias=False),
        *norm(f"{below}.g_norm", "mixer.norm", bias=True),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    config, layer = full(config), f"model.layers.{block}"
    return [
        *fla_rwkv.norms(layer),
        *fla.mixer_tensors(config, block, lambda: time_mix(f"{layer}.attn", block)),
        *same(f"{layer}.ffn.x_k", "mlp.mu_k"),
        *linear(f"{layer}.ffn.key", "mlp.k_proj"),
        *linear(f"{layer}.ffn.value", "mlp.v_proj"),
    ]


def unused(config: Config, block: int) -> Sequence[str]:
    """The first block's values are what the others mix in."""
    if block or fla.blocks(full(config), "rwkv7")[0] != "rwkv7":
        return []
    return [f"mixer.v_mix.{name}" for name in ("down.kernel", "up.kernel", "up.bias")]


FAMILY = Family(
    ("rwkv7",),
    lambda config: fla.blocks(full(config), "rwkv7"),
    options,
    lambda config: fla_rwkv.outside(full(config)),
    inside,
    unused=unused,
)
