"""A trained model with other mixers: which blocks change, and what of the weights can stay.

Weights of attention carry over to a linear mixer because both read the same queries, keys and values (Kasai et al.
2021, arXiv:2103.13076; Wang et al. 2024, arXiv:2408.15237).
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import MIXERS
from effattn_jax.models.block import Block
from effattn_jax.models.blueprint import Parameters
from effattn_jax.models.language_model import BLOCK_OPTIONS, LanguageModel
from effattn_jax.models.pattern import Pattern, repeated_pattern
from effattn_jax.typing import Array

OTHER_NAMES = ("", "qkv.")  # delta rules keep their projections below `qkv`


def block_names(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The name of each block of `LanguageModel(**options)`, in order."""
    pattern = tuple(options["pattern"]) * options["repeats"]
    return (*options.get("before", ()), *pattern, *options.get("after", ()))


def pattern_of(options: Mapping[str, Any]) -> Pattern:
    """The pattern as the options spell it, whatever shorter one there may be."""
    before, after = tuple(options.get("before", ())), tuple(options.get("after", ()))
    return Pattern(before, tuple(options["pattern"]), options["repeats"], after)


def with_mixer(
    options: Mapping[str, Any], mixer: str, replaced: Sequence[int], mixer_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Options of `LanguageModel` with another mixer in the blocks `replaced`.

    What both mixers call heads, kv_heads and head_dim stays, unless `mixer_options` says otherwise; values are as wide
    as keys.

    Raises:
      ValueError: a mixer that is not known, or blocks that are not there.
    """
    names = block_names(options)
    if mixer not in MIXERS:
        checks.fail("mixer", repr(mixer), f"one of {', '.join(sorted(MIXERS))}")
    if not replaced or any(not 0 <= i < len(names) for i in replaced):
        checks.fail("replaced", list(replaced), f"some of the blocks 0 .. {len(names) - 1}")
    mixers = {name: dict(given) for name, given in options["mixers"].items()}
    blocks = list(names)
    for i in replaced:
        old = mixers.get(names[i], {})
        name = f"{names[i]} as {mixer}"
        kept = {key: value for key, value in old.items() if key in BLOCK_OPTIONS}
        mixers[name] = {"kind": mixer} | kept | _heads(old, options["dim"], mixer) | dict(mixer_options or {})
        blocks[i] = name
    split = repeated_pattern(blocks)
    return dict(options) | {
        "mixers": mixers,
        "before": split.before,
        "pattern": split.pattern,
        "repeats": split.repeats,
        "after": split.after,
    }


def _heads(attention: Mapping[str, Any], dim: int, mixer: str) -> dict[str, Any]:
    heads = attention.get("heads")
    if heads is None:
        return {}
    head_dim = attention.get("head_dim") or dim // heads
    wanted = {"heads": heads, "kv_heads": attention.get("kv_heads"), "head_dim": head_dim}
    wanted |= {"expand_k": 1.0, "expand_v": 1.0}
    own = [vars(layer)["__init__"] for layer in MIXERS[mixer].__mro__ if "__init__" in vars(layer)]
    known = {name for start in own[:-1] for name in inspect.signature(start).parameters}  # object's is the last
    return {name: value for name, value in wanted.items() if name in known and value is not None}


def reuse(
    teacher: Mapping[str, Array],
    teacher_pattern: Pattern,
    student: Mapping[str, Array],
    student_pattern: Pattern,
    *,
    head_dim: int,
    new: Sequence[int] = (),
) -> tuple[Parameters, dict[str, int]]:
    """The student's parameters with the teacher's where a name and a shape fit, in the model and block by block.

    Keys and values of fewer heads, of `head_dim` channels each, are repeated for the heads that share them. Mixers of
    the blocks `new` take nothing.

    Returns:
      parameters, and how many numbers of each came from the teacher.
    """
    found, taken = dict(student), dict.fromkeys(student, 0)
    for name, old in teacher.items():
        if name in found and not name.startswith(("before.", "units.", "after.")) and old.shape == found[name].shape:
            found[name], taken[name] = old.astype(found[name].dtype), old.size
    for block in range(len(block_list(student_pattern))):
        below, at = student_pattern.place(block)
        teacher_below, teacher_at = teacher_pattern.place(block)
        for name in [name for name in found if name.startswith(f"{below}.")]:
            if block in new and name.startswith(f"{below}.mixer."):
                continue
            old_name = _of_teacher(name.removeprefix(f"{below}."), teacher_below, teacher)
            if old_name is None:
                continue
            old = teacher[old_name][teacher_at] if teacher_at else teacher[old_name]
            fitted = _fitted(name, old, found[name][at].shape, head_dim)
            if fitted is not None:
                found[name] = found[name].at[at].set(fitted.astype(found[name].dtype))
                taken[name] += fitted.size
    return found, taken


def block_list(pattern: Pattern) -> tuple[str, ...]:
    return (*pattern.before, *pattern.pattern * pattern.repeats, *pattern.after)


def _of_teacher(name: str, below: str, teacher: Mapping[str, Array]) -> str | None:
    """The teacher's parameter for one of the student's block."""
    part, _, rest = name.partition(".")
    for other in OTHER_NAMES if part == "mixer" else ("",):
        old = f"{below}.{part}.{rest.removeprefix(other)}"
        if rest.startswith(other) and old in teacher:
            return old
    return None


def _fitted(name: str, old: Array, shape: tuple[int, ...], head_dim: int) -> Array | None:
    """As it is, or with keys and values repeated for more heads; None where neither fits."""
    if old.shape == shape:
        return old
    shared = name.endswith(("k_proj.kernel", "v_proj.kernel"))
    if shared and old.shape[0] == shape[0] and shape[1] % old.shape[1] == 0 and old.shape[1] % head_dim == 0:
        by_head = old.reshape(len(old), -1, head_dim)
        return jnp.repeat(by_head, shape[1] // old.shape[1], axis=1).reshape(shape)
    return None


def blocks_of(model: LanguageModel) -> list[Block]:
    """Each block by itself, in order, with its part of stacked parameters and the lower bounds that it reads."""
    graph, stacked = nnx.split(model.units)
    units = [nnx.merge(graph, jax.tree.map(lambda x, r=r: x[r], stacked)) for r in range(model.repeats)]
    copy = lambda unit: [] if unit is None else nnx.merge(*nnx.split(unit)).blocks  # noqa: E731
    blocks = [*copy(model.before), *(block for unit in units for block in unit.blocks), *copy(model.after)]
    for block in blocks:
        if block.bounds_name is not None:
            block.mixer.bound_logits = model.bounds[block.bounds_name]
    return blocks
