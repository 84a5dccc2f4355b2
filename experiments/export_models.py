"""Published models changed a little, written by `save`, beside what they then compute: for `open_in_transformers`.

    python -m experiments.export_models [--output=runs/exports] [--only=mamba]

The tests' fixtures are read by `load`; presets are made from nothing by `from_config`, at the sizes below and with all
else as published. Every trained parameter x becomes x (1 + 0.01 n) + 0.02 n' with normal n, n', so that nothing is what
was read, no norm is 1 and no bias 0.
Written are OUTPUT/<name>/config.json and model.safetensors, and OUTPUT/<name>.npz: tokens and float32 logits of one
full pass over two rows of 37.
"""

import json
import pathlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from effattn_jax.layers.buffer import Buffer
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.pretrained import from_config, load, save
from effattn_jax.pretrained.build import kind_of
from effattn_jax.pretrained.families import FAMILIES
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.presets import preset

FLAGS = flags.FlagValues()
OUTPUT = flags.DEFINE_string("output", "runs/exports", "what is there is not made again", flag_values=FLAGS)
ONLY = flags.DEFINE_string("only", "", "models whose name has this in it", flag_values=FLAGS)

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "models"
PRESETS = (
    "delta_net-340m",
    "falcon-mamba-7b",
    "gemma-3-4b",
    "gla-1.3b",
    "gpt-oss-20b",
    "jamba-v0.1",
    "kimi-linear-48b-a3b",
    "mamba-130m",
    "mamba-codestral-7b",
    "mistral-7b-v0.1",
    "mistral-7b-v0.3",
    "qwen3-next-80b-a3b",
    "recurrentgemma-2b",
)
SIZES: dict[str, Any] = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "attention_window_size": 8,
    "head_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "kv_lora_rank": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "linear_attn_config": {
        "full_attn_layers": [4],
        "kda_layers": [1, 2, 3],
        "num_heads": 4,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    },
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "mamba_d_state": 8,
    "mamba_dt_rank": 2,
    "moe_intermediate_size": 16,
    "n_groups": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "query_pre_attn_scalar": 24,
    "shared_expert_intermediate_size": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "state_size": 8,
    "time_step_rank": 2,
    "v_head_dim": 8,
}
"""Of fields that a preset gives a value; heads are 4, or 8 of 8 channels in Mamba-2, keys and values 2 or as many."""


def shrunk(name: str) -> Config:
    """The preset at these sizes."""
    config = dict(preset(name))
    heads = {"num_attention_heads": 4, "num_heads": 8 if config["model_type"] == "mamba2" else 2}
    if "num_key_value_heads" in config:
        all_heads = config["num_key_value_heads"] == config["num_attention_heads"]
        heads["num_key_value_heads"] = 4 if all_heads else min(config["num_key_value_heads"], 2)
    sizes = SIZES | heads
    given = {key: sizes[key] if key in sizes and value is not None else value for key, value in config.items()}
    return given | {"vocab_size": 64, "pad_token_id": 0}


def changed(model: LanguageModel, seed: int) -> LanguageModel:
    """The model with other numbers in its parameters."""
    rng = np.random.default_rng(seed)

    def other(x: jax.Array) -> jax.Array:
        factor, shift = (rng.standard_normal(x.shape, np.float32) for _ in range(2))
        return (x * (1 + 0.01 * factor) + 0.02 * shift).astype(x.dtype)

    trained = nnx.state(model, nnx.All(nnx.Param, nnx.Not(Buffer)))
    nnx.update(model, jax.tree.map(other, trained))
    return model


def wanted(name: str) -> bool:
    return ONLY.value in name and not (pathlib.Path(OUTPUT.value) / f"{name}.npz").exists()


def models() -> Iterator[tuple[str, LanguageModel]]:
    """Computing in float32."""
    for path in filter(lambda path: wanted(path.name), sorted(FIXTURES.iterdir())):
        if kind_of(json.loads((path / "config.json").read_text())) in FAMILIES:
            yield path.name, load(path)
    for name in filter(wanted, PRESETS):
        yield name, from_config(shrunk(name), dtype=jnp.float32, rngs=nnx.Rngs(0))


def main() -> None:
    FLAGS(sys.argv)
    forward = nnx.jit(lambda model, tokens: model(tokens)[0])
    output = pathlib.Path(OUTPUT.value)
    for name, model in models():
        seed = zlib.crc32(name.encode())
        model = changed(model, seed)
        save(model, output / name)
        tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (2, 37))
        logits = np.asarray(forward(model, tokens), np.float32)
        np.savez(output / f"{name}.npz", tokens=tokens, logits=logits)
        print(f"{name}: logits with a deviation of {logits.std():.2f}", flush=True)


if __name__ == "__main__":
    main()
