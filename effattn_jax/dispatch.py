"""Where a mechanism runs: `implementation = None | name | sequence of names`.

An implementation is a function that raises `NotImplementedError`, with the reason, for a call it does not support.
`None` takes the first of the given order that supports the call; one name takes that one or fails with its reason; a
sequence takes the first of its own that supports the call. There is no registry: each mechanism passes its own mapping.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None


def platform() -> str:
    """The platform a call without further placement runs on: "cpu", "gpu" or "tpu"."""
    device: Any = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def dispatch[**P, R](
    mechanism: str,
    implementations: Mapping[str, Callable[P, R]],
    implementation: Implementation,
    default: Sequence[str],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Call the first implementation that supports `(*args, **kwargs)`.

    Args:
      mechanism: the public name, for messages.
      implementations: name -> function.
      implementation: what the user asked for.
      default: the names tried, in this order, when `implementation` is None.

    Raises:
      ValueError: an unknown name, or an empty sequence.
      NotImplementedError: the one named implementation refuses this call.
      ExceptionGroup: several were tried and all refuse; it holds the reason of each.
    """
    names = _names(mechanism, implementations, implementation, default)
    if isinstance(implementation, str):
        return _call(mechanism, implementation, implementations[implementation], *args, **kwargs)
    refusals = []
    for name in names:
        try:
            return _call(mechanism, name, implementations[name], *args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    raise ExceptionGroup(f"{mechanism}: no implementation supports this call; tried {', '.join(names)}", refusals)


def _names(
    mechanism: str, implementations: Mapping[str, Any], implementation: Implementation, default: Sequence[str]
) -> Sequence[str]:
    if implementation is None:
        return default
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        raise ValueError(
            f"{mechanism}: implementation got {implementation!r}; needs None or some of {', '.join(implementations)}"
        )
    return names


def _call[**P, R](mechanism: str, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return function(*args, **kwargs)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{mechanism}: implementation {name!r} refuses this call: {refusal}") from refusal
