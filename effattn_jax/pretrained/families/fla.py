"""What the models of flash-linear-attention share: a mixer and SwiGLU between norms, softmax attention in some blocks.

A config may leave out what its class has as a default. `attn` names the blocks of softmax attention, in one group with
its sizes or in a list of groups.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.models.pattern import Pattern, repeated_pattern
from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family

COMMON: Mapping[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
    "attn": None,
    "attnres_block_size": None,
}
"""Defaults of most config classes."""


def family(
    model_type: str,
    kind: str,
    defaults: Config,
    mixer: Callable[[Config], dict[str, Any]],
    tensors: Callable[[Config, str], Sequence[Entry]],
    *,
    only: Config | None = None,
    shared: Callable[[Config], Sequence[Entry]] = lambda config: [],
) -> Family:
    """A family of models with SwiGLU.

    Args:
      kind: the mixer's name in `effattn_jax.layers.MIXERS`.
      defaults: of the config's class, where it is not `COMMON`.
      mixer: the mixer's options.
      tensors: the mixer's, below a name.
      only: keys of the config of which one value is supported.
      shared: tensors of the mixers that belong to no block.
    """
    full = lambda config: {**COMMON, **defaults, **config}  # noqa: E731

    def options(config: Config) -> dict[str, Any]:
        config = full(config)
        supported(config, {"hidden_act": "swish", "attnres_block_size": None, **(only or {})})
        return {
            **sizes(config),
            "mlp_dim": config["intermediate_size"] or swiglu_size(config["hidden_size"], config["hidden_ratio"]),
            "mixers": {kind: mixer(config), **softmax_mixers(config)},
        }

    def inside(config: Config, block: int) -> Sequence[Entry]:
        config, layer = full(config), f"model.layers.{block}"
        return [
            *norm(f"{layer}.attn_norm", "norm"),
            *mixer_tensors(config, block, lambda: tensors(config, f"{layer}.attn")),
            *norm(f"{layer}.mlp_norm", "mlp_norm"),
            *llama.gated_mlp(f"{layer}.mlp"),
        ]

    return Family(
        (model_type,),
        lambda config: blocks(full(config), kind),
        options,
        lambda config: [*outside(full(config)), *shared(full(config))],
        inside,
    )


def supported(config: Config, only: Config) -> None:
    for key, value in only.items():
        if config.get(key, value) != value:
            checks.fail(key, repr(config[key]), f"{value!r} in models of type {config['model_type']!r}")


def sizes(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "norm_eps": config["norm_eps"],
        "tie_embeddings": config["tie_word_embeddings"],
    }


def swiglu_size(dim: int, ratio: float | None) -> int:
    """2/3 of `ratio` times dim, up to the next multiple of 256."""
    return 256 * -(-int(dim * (ratio or 4) * 2 / 3) // 256)


def groups(config: Config) -> Sequence[Config]:
    """Those of the blocks with softmax attention."""
    given = config["attn"] or []
    return [given] if isinstance(given, Mapping) else given


def blocks(config: Config, kind: str) -> Sequence[str]:
    """The mixer's kind, or "attention 0" for the first group of blocks with softmax attention, and so on."""
    count = config["num_hidden_layers"]
    names = [kind] * count
    for i, group in enumerate(groups(config)):
        for block in group["layers"]:
            if not 0 <= block < count or names[block] != kind:
                checks.fail("attn", f"block {block}", f"each of 0 .. {count - 1} at most once")
            names[block] = f"attention {i}"
    return names


def pattern(config: Config, kind: str) -> Pattern:
    return repeated_pattern(blocks(config, kind))


def softmax_mixers(config: Config) -> dict[str, dict[str, Any]]:
    return {
        f"attention {i}": {
            "kind": "attention",
            "heads": group["num_heads"],
            "kv_heads": group.get("num_kv_heads"),
            "window": group.get("window_size"),
            "rope_theta": group.get("rope_theta", 10_000.0),
            "bias": group.get("qkv_bias", False),
        }
        for i, group in enumerate(groups(config))
    }


def mixer_tensors(config: Config, block: int, own: Callable[[], Sequence[Entry]]) -> Sequence[Entry]:
    """Those of softmax attention, or the mixer's own."""
    for group in groups(config):
        if block in group["layers"]:
            return llama.attention(f"model.layers.{block}.attn", bias=group.get("qkv_bias", False))
    return own()


def outside(config: Config) -> Sequence[Entry]:
    return [
        *same("model.embeddings.weight", "embedding"),
        *norm("model.norm", "final_norm"),
        *([] if config["tie_word_embeddings"] else linear("lm_head", "head")),
    ]


def projections(below: str, mixer: str = "mixer", *, bias: bool = False) -> list[Entry]:
    """q_proj, k_proj and v_proj."""
    return [entry for x in "qkv" for entry in linear(f"{below}.{x}_proj", f"{mixer}.{x}_proj", bias=bias)]


def convolutions(below: str, mixer: str = "mixer") -> list[Entry]:
    """q_conv1d, k_conv1d and v_conv1d."""
    return [entry for x in "qkv" for entry in convolution(f"{below}.{x}_conv1d", f"{mixer}.{x}_conv")]


def short_qkv(below: str) -> list[Entry]:
    """Both, of the delta rules."""
    return [*projections(below, "mixer.qkv"), *convolutions(below, "mixer.qkv")]


def low_rank(below: str, name: str, bias: bool = False) -> list[Entry]:
    """Two matrices in a row."""
    return [*linear(f"{below}.0", f"{name}.down"), *linear(f"{below}.1", f"{name}.up", bias=bias)]
