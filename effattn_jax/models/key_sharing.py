"""Which layers of a stack read the keys and values of which, and what crosses from one repetition to the next."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.layers import MIXERS

KV_FROM = "kv_from"
ALIKE = ("kv_heads", "head_dim", "rope_theta", "rope_fraction", "rope_scaling")
"""Options that keys and values, and the queries that read them, must have in common."""


def read_names(mixers: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> frozenset[str]:
    """Names whose keys a layer of these names reads."""
    return frozenset(mixers[name][KV_FROM] for name in names if mixers.get(name, {}).get(KV_FROM) is not None)


def check_key_sharing(mixers: Mapping[str, Mapping[str, Any]], layers: Sequence[str]) -> None:
    """Args:
      layers: the names of all layers, from the first on.

    Raises:
      ValueError: a layer reads one that is not below it, that has no keys of its own, is of another kind, has keys of
        another shape or rotation, or a narrower window.
    """
    seen = set[str]()
    for name in layers:
        options = mixers.get(name, {})
        source = options.get(KV_FROM)
        if source is not None and name not in seen:
            if source not in seen:
                checks.fail(f"{name}.{KV_FROM}", repr(source), f"a layer below the first {name!r}: {sorted(seen)}")
            _check_pair(name, options, source, mixers.get(source, {}))
        seen.add(name)


def _check_pair(name: str, options: Mapping[str, Any], source: str, given: Mapping[str, Any]) -> None:
    if given.get(KV_FROM) is not None:
        checks.fail(f"{name}.{KV_FROM}", repr(source), "a layer with keys of its own")
    kinds = options.get("kind", name), given.get("kind", source)
    if not all(hasattr(MIXERS[kind], "with_keys") for kind in kinds):
        able = ", ".join(sorted(kind for kind, mixer in MIXERS.items() if hasattr(mixer, "with_keys")))
        checks.fail(f"{name}.{KV_FROM}", f"{kinds[0]!r} that reads {kinds[1]!r}", f"both of {able}")
    for option in ALIKE:
        ours, theirs = options.get(option), given.get(option)
        if ours != theirs:
            checks.fail(f"{name}.{option}", ours, f"{theirs!r}, that of {source!r}, whose keys it reads")
    ours, theirs = options.get("window"), given.get("window")
    if theirs is not None and (ours is None or ours > theirs):
        checks.fail(f"{name}.window", ours, f"at most {theirs}, that of {source!r}, whose keys it reads")


def carried(mixers: Mapping[str, Mapping[str, Any]], pattern: Sequence[str], after: Sequence[str]) -> frozenset[str]:
    """Names of the pattern whose keys are read beyond the repetition: before they are made anew, or after the last."""
    found = set[str]()
    for names in (pattern, after):
        made = set[str]()
        for name in names:
            source = mixers.get(name, {}).get(KV_FROM)
            if source is not None and source in pattern and source not in made:
                found.add(source)
            made.add(name)
    return frozenset(found)
