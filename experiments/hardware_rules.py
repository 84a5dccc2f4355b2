"""Do blocks need 64 tokens, and groups 16 heads? Block attention timed over both, each case checked first.

    python -m experiments.hardware_rules [--length=8192] [--tokens=1024] [--heads=64] [--dim=128] [--output=rules.json]

Every query reads `tokens` tokens in blocks drawn at random from its past, the same for the heads of its group;
bfloat16. Printed are milliseconds of the forward pass and of it with the gradients, TFLOP/s of the pairs read (4 D a
pair forward, 14 D with the gradients) and TB/s of keys and values as each list reads them. A case is checked on a
shorter row against softmax attention under the same mask. `--implementation` names another than None takes here.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from effattn_jax.sparse import block_attention
from effattn_jax.sparse.dense import masked
from experiments.report import write_report
from experiments.timing import timed

FLAGS = flags.FlagValues()
LENGTH = flags.DEFINE_integer("length", 8192, "tokens of the row", flag_values=FLAGS)
TOKENS = flags.DEFINE_integer("tokens", 1024, "tokens that a query reads", flag_values=FLAGS)
HEADS = flags.DEFINE_integer("heads", 64, "query heads", flag_values=FLAGS)
SIZE = flags.DEFINE_integer("dim", 128, "of keys and values", flag_values=FLAGS)
BLOCKS = flags.DEFINE_multi_integer("block_size", [16, 32, 64, 128, 256], "tokens of a block", flag_values=FLAGS)
GROUPS = flags.DEFINE_multi_integer("group", [1, 4, 16, 64], "query heads that share keys and lists", flag_values=FLAGS)
IMPLEMENTATION = flags.DEFINE_string("implementation", None, "of block_attention", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "also write the table as JSON", flag_values=FLAGS)

TOLERANCE = 0.008  # bfloat16, gradients among them


def lists(length: int, count: int, block_size: int, groups: int) -> np.ndarray:
    """[1, T, G, n]: distinct blocks up to the query's own, which is always one."""
    rng = np.random.default_rng(0)
    own = (np.arange(length) // block_size)[:, None, None]
    scores = rng.random((length, groups, -(-length // block_size)))
    block = np.arange(scores.shape[-1])
    scores = np.where(block > own, -1, np.where(block == own, 2, scores))
    order = np.argsort(-scores, axis=-1)[..., :count]
    return np.where(np.take_along_axis(scores, order, -1) < 0, -1, order)[None].astype(np.int32)


def arrays(length: int, heads: int, groups: int, dim: int) -> dict[str, jax.Array]:
    shapes = {"q": heads, "k": groups, "v": groups, "do": heads}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (1, length, count, dim), jnp.bfloat16)
        for key, (name, count) in zip(keys, shapes.items(), strict=True)
    }


def attend(inputs: dict[str, Any], block_size: int) -> jax.Array:
    q, k, v, indices = (inputs[name] for name in ("q", "k", "v", "indices"))
    return block_attention(q, k, v, indices, block_size=block_size, implementation=IMPLEMENTATION.value)[0]


def gradients(inputs: dict[str, Any], block_size: int) -> Any:
    def loss(qkv: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out = attend(inputs | qkv, block_size)
        return jnp.sum(out.astype(jnp.float32) * inputs["do"].astype(jnp.float32)), out

    return jax.grad(loss, has_aux=True)({name: inputs[name] for name in "qkv"})


def error(block_size: int, group: int, heads: int, dim: int, tokens: int) -> float:
    """Largest error ratio of the output and the gradients, over a row of at least four blocks."""
    length = max(256, 4 * block_size) + 3
    groups = heads // group
    inputs = arrays(length, heads, groups, dim)
    indices = lists(length, max(1, min(tokens // block_size, 3)), block_size, groups)
    got = jax.jit(lambda inputs: gradients(inputs, block_size))(inputs | {"indices": indices})
    blocks = np.zeros((length, groups, -(-length // block_size) + 1), bool)
    np.put_along_axis(blocks, indices[0], True, -1)  # -1 falls into a column of its own
    mask = np.repeat(blocks[..., :-1], block_size, -1)[..., :length] & np.tri(length, dtype=bool)[:, None]

    def loss(qkv: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts = []
        for g in range(groups):
            q, k, v = qkv["q"][:, :, g * group : (g + 1) * group], qkv["k"][:, :, g : g + 1], qkv["v"][:, :, g : g + 1]
            parts.append(masked(q, k, v, mask[None, :, g], scale=dim**-0.5)[0])
        out = jnp.concatenate(parts, axis=2)
        return jnp.sum(out * inputs["do"].astype(jnp.float32)), out

    want = jax.jit(jax.grad(loss, has_aux=True))({name: inputs[name].astype(jnp.float32) for name in "qkv"})
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
    ratios = jax.tree.map(lambda w, x: rms(w - x) / (rms(w) + 1e-8), want, got)
    return max(float(x) for x in jax.tree.leaves(ratios))


def row(block_size: int, group: int) -> dict[str, Any]:
    length, heads, dim = LENGTH.value, HEADS.value, SIZE.value
    groups, count = heads // group, max(1, TOKENS.value // block_size)
    worst = error(block_size, group, min(heads, 4 * group), dim, TOKENS.value)
    if not worst <= TOLERANCE:
        raise SystemExit(f"blocks of {block_size}, groups of {group}: error {worst:.1e}; needs at most {TOLERANCE}")
    indices = lists(length, count, block_size, groups)
    inputs = arrays(length, heads, groups, dim) | {"indices": jnp.asarray(indices)}
    forward = timed(lambda inputs: attend(inputs, block_size), inputs, repetitions=3)
    both = timed(lambda inputs: gradients(inputs, block_size), inputs, repetitions=3)
    read = int((indices >= 0).sum()) * block_size  # by lists, keys after the query in its own block among them
    return {
        "block_size": block_size,
        "group": group,
        "error": worst,
        "forward_ms": forward.milliseconds,
        "both_ms": both.milliseconds,
        "forward_tflops": 4 * dim * read * group / forward.milliseconds / 1e9,
        "both_tflops": 14 * dim * read * group / both.milliseconds / 1e9,
        "forward_tbs": 4 * dim * read / forward.milliseconds / 1e9,
        "spread": max(forward.spread, both.spread),
    }


def main() -> None:
    FLAGS(sys.argv)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, T {LENGTH.value}, {TOKENS.value} tokens a query, H {HEADS.value}, ", end=""
    )
    print(f"D {SIZE.value}, bfloat16")
    print("block  heads a group  forward ms  with backward  TFLOP/s      TB/s    error  spread")
    rows = []
    for block_size in BLOCKS.value:
        for group in GROUPS.value:
            if HEADS.value % group:
                raise SystemExit(f"group: got {group}; needs a divisor of the {HEADS.value} heads")
            rows.append(row(block_size, group))
            r = rows[-1]
            print(
                f"{block_size:5d}  {group:13d}  {r['forward_ms']:10.3f}  {r['both_ms']:13.3f}  "
                f"{r['forward_tflops']:7.2f}  {r['forward_tbs']:8.3f}  {r['error']:7.1e}  {r['spread']:6.1%}",
                flush=True,
            )
            if OUTPUT.value:
                write_report(OUTPUT.value, "experiments.hardware_rules", rows)


if __name__ == "__main__":
    main()
