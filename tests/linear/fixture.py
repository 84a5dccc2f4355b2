"""Outputs, states and gradients of public implementations: tests/fixtures/ops/<op>.npz.

Keys are <case>/in/<x>, <case>/out/<x>, <case>/cot/<out> (cotangents) and <case>/grad/<in>.
"""

from functools import cache
from pathlib import Path

import jax
import numpy as np

from tests.compiled import jit

FOLDER = Path(__file__).parents[1] / "fixtures" / "ops"


@cache
def load(op):
    """case -> kind -> name -> array."""
    cases = {}
    with np.load(FOLDER / f"{op}.npz") as arrays:
        for key in arrays.files:
            case, kind, name = key.split("/")
            cases.setdefault(case, {}).setdefault(kind, {})[name] = arrays[key]
    return cases


def assert_matches(function, case):
    """`function(inputs)` returns the outputs by name; in float32, to the tolerances the fixtures were made for."""
    inputs, cotangents = case["in"], case.get("cot")
    if cotangents is None:
        out, grads = jit(function)(inputs), {}
    else:
        out, grads = jit(partial_vjp(function))(inputs, cotangents)
    for kind, got, factor in (("out", out, 1), ("grad", grads, 5)):
        want = case.get(kind, {})
        assert want.keys() <= got.keys()
        for name, x in want.items():
            atol = 1e-5 * max(1.0, np.abs(x).max())
            np.testing.assert_allclose(got[name], x, rtol=factor * 1e-4, atol=factor * atol, err_msg=f"{kind} {name}")


def partial_vjp(function):
    def out_and_grads(inputs, cotangents):
        out, pull = jax.vjp(lambda inputs: {name: function(inputs)[name] for name in cotangents}, inputs)
        return out, pull(cotangents)[0]

    return out_and_grads
