"""Options that a function is given by name: known ones, and all it needs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from effattn_jax import checks


def check_options(argument: str, options: Mapping[str, Any], function: Callable[..., Any], given: int = 0) -> None:
    """`options` of a function that gets its first `given` arguments, and those of `BY_CALLER`, from elsewhere."""
    parameters = list(inspect.signature(function).parameters.values())[given:]
    parameters = [parameter for parameter in parameters if parameter.name not in BY_CALLER]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = ", ".join(parameter.name for parameter in parameters) or "none"
    for name in options:
        if name not in {parameter.name for parameter in parameters}:
            checks.fail(argument, repr(name), f"options of {function.__name__}: {known}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            checks.fail(argument, f"no {parameter.name!r}", f"what {function.__name__} has no default of: {known}")


BY_CALLER = ("scale", "rotate", "logits_soft_cap")
