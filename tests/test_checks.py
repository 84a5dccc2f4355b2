"""Every check passes what fits, and names the argument, what it got and what it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import checks

x = np.zeros((2, 3))
ids = np.array([[0, 0, 1], [4, -1, 4]])

FITS = {
    "shape": lambda: checks.check_shape("q", x, (2, None), "[B, T]"),
    "rank": lambda: checks.check_rank("q", x, 2, "[B, T]"),
    "floating": lambda: checks.check_floating("q", jnp.zeros(2, jnp.bfloat16)),
    "choice": lambda: checks.check_choice("form", "parallel", ("parallel", "chunkwise")),
    "no choice": lambda: checks.check_choice("form", None, ("parallel",)),
    "head groups": lambda: checks.check_head_groups("k", 2, "q", 6),
    "segment ids": lambda: checks.check_segment_ids(ids, 2, 3),
    "no segment ids": lambda: checks.check_segment_ids(None, 2, 3),
    "no rows": lambda: checks.check_segment_ids(np.zeros((0, 0), int), 0, 0),
}
FAILS = {
    "size": (lambda: checks.check_shape("q", x, (2, 4), "[B, T]"), "q: got shape (2, 3); needs [B, T] = [2, 4]"),
    "any size": (
        lambda: checks.check_shape("q", x, (1, None), "[B, T]"),
        "q: got shape (2, 3); needs [B, T] = [1, any]",
    ),
    "shape": (lambda: checks.check_shape("q", x, (2,), "[B]"), "q: got shape (2, 3); needs [B] = [2]"),
    "rank": (
        lambda: checks.check_rank("k", x, 4, "[B, T, H, K]"),
        "k: got shape (2, 3); needs 4 dimensions [B, T, H, K]",
    ),
    "integers": (
        lambda: checks.check_floating("v", np.zeros(2, np.int32)),
        "v: got dtype int32; needs a floating dtype",
    ),
    "bools": (lambda: checks.check_floating("v", np.zeros(2, bool)), "v: got dtype bool; needs a floating dtype"),
    "choice": (lambda: checks.check_choice("form", "x", ("a", "b")), "form: got 'x'; needs None or one of a, b"),
    "heads": (
        lambda: checks.check_head_groups("k", 4, "q", 6),
        "k: got 4 heads; needs a number that divides the 6 heads of q",
    ),
    "no heads": (
        lambda: checks.check_head_groups("k", 0, "q", 6),
        "k: got 0 heads; needs a number that divides the 6 heads of q",
    ),
    "segment shape": (
        lambda: checks.check_segment_ids(ids, 2, 4),
        "segment_ids: got shape (2, 3); needs [B, T] = [2, 4]",
    ),
    "segment dtype": (
        lambda: checks.check_segment_ids(ids.astype(np.float32), 2, 3),
        "segment_ids: got dtype float32; needs an integer dtype",
    ),
    "decreasing": (
        lambda: checks.check_segment_ids(np.array([[0, 0, 1], [2, -1, 1]]), 2, 3),
        "segment_ids: got a row (1) that decreases; needs ids that never decrease along a row",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_fits(case):
    FITS[case]()


@pytest.mark.parametrize("case", FAILS)
def test_fails(case):
    check, message = FAILS[case]
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        check()
    assert str(error.value) == message


def test_traced_segment_ids_pass_on_shape_and_dtype():
    assert jax.jit(lambda ids: checks.check_segment_ids(ids, 2, 3) or ids)(ids[:, ::-1]).shape == (2, 3)
    with pytest.raises(ValueError, match="integer dtype"):
        jax.jit(lambda ids: checks.check_segment_ids(ids, 2, 3) or ids)(x)
