"""Goldens of one head, printed to six decimals, and cases of fixtures by form."""

import jax
import numpy as np
import pytest

from tests.linear import fixture


def one_head(run, inputs, **options):
    """`run(**inputs, **options)` in float64 for inputs [T, ...] of one head: out [T, V] and state [K, V]."""
    with jax.enable_x64(True):
        inputs = {name: np.asarray(x, np.float64)[None, :, None] for name, x in inputs.items() if x is not None}
        out, state = run(**inputs, **options)
        return np.asarray(out)[0, :, 0], np.asarray(state)[0, 0]


def assert_printed(got, sum_of_out, last_out, state):
    """Sums and entries of (out, state): the last row of out; the sum and the first entry of the state."""
    close = lambda x, want: np.testing.assert_allclose(x, want, rtol=0, atol=5.1e-7)  # noqa: E731
    close(got[0].sum(), sum_of_out)
    close(got[0][-1], last_out)
    close([got[1].sum(), got[1][0, 0]], state)


def cases(op, forms, *quick):
    """All forms of all cases of a fixture; the quick ones are those of the default form."""
    return pytest.mark.parametrize(
        ("case", "form"),
        [
            pytest.param(case, form, marks=() if case in quick and form == "chunkwise" else pytest.mark.slow)
            for case in fixture.load(op)
            for form in forms
        ],
    )
