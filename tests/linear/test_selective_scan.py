"""The selective scan against printed goldens and a public implementation, its memory, and what it contains."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import diagonal_scan, selective_scan
from effattn_jax.linear.selective_scan import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det
from tests.linear.engines import every_form
from tests.ratio import FLOAT32, assert_close

T = 8
softplus = lambda x: np.logaddexp(0, x)  # noqa: E731
run = jit(selective_scan, static_argnames="form")


@every_form
def test_golden_mamba(form):
    x, z = det(3, (T, 3)), det(17, (T, 3))
    dt, A = softplus(det(13, (T, 3)) - 1 + 0.2 * det(18, (3,))), -np.tile(np.arange(1.0, 5), (3, 1))
    B, C = det(14, (T, 4)), det(15, (T, 4))
    with jax.enable_x64(True):
        y, state = run(x[None], dt[None], A, B[None], C[None], 1 + 0.1 * det(16, (3,)), form=form)
    out, state = np.asarray(y)[0] * z / (1 + np.exp(-z)), np.asarray(state)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5.1e-7)
    close(out.sum(), 0.177890)
    close(out[-1], [0.143330, -0.082870, -0.189825])
    close([state.sum(), state[0, 0, 0]], [-2.331639, -0.176578])


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if case == "T65" and form == "chunkwise" else pytest.mark.slow)
        for case in fixture.load("mamba1_selective_scan")
        for form in FORMS
    ],
)
def test_fixture(form, case):
    """Tokens last there; the bias and softplus of dt and the gate are part of the reference."""

    def function(x):
        rows = lambda name: jnp.swapaxes(x[name], 1, 2)  # noqa: E731
        dt = jax.nn.softplus(rows("delta") + x["delta_bias"])
        y, state = selective_scan(rows("u"), dt, x["A"], rows("B"), rows("C"), x["D"], form=form)
        return {"o": jnp.swapaxes(y, 1, 2) * jax.nn.silu(x["z"]), "ht": state}

    fixture.assert_matches(function, fixture.load("mamba1_selective_scan")[case])


@pytest.mark.quick_cases(3)
@every_form
def test_one_memory_is_a_diagonal_scan(form):
    rng = np.random.default_rng(0)
    x, B, C = (rng.standard_normal((2, 70, n), np.float32) for n in (5, 1, 1))
    dt, A = rng.uniform(0, 1, (2, 70, 5)).astype(np.float32), -rng.uniform(0.5, 2, (5, 1)).astype(np.float32)
    h, state = jit(diagonal_scan)(dt * x * B, dt * A[:, 0])
    assert_close((h * C, state[..., None]), run(x, dt, A, B, C, form=form), FLOAT32)


LENGTH, DIM, STATES = 1024, 40, 12


@functools.cache
def gradient_program(form):
    """Compiled values and gradients of all arguments; and the text of the optimised program."""
    f = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    arguments = (f(1, LENGTH, DIM), f(1, LENGTH, DIM), f(DIM, STATES), f(1, LENGTH, STATES), f(1, LENGTH, STATES))
    loss = lambda *a: jnp.sum(jnp.sin(selective_scan(*a, form=form)[0]))  # noqa: E731
    lowered = jax.jit(jax.value_and_grad(loss, range(5))).lower(*arguments)
    compiled = lowered.compile()
    return lowered.as_text() + compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def largest_array(program):
    """Numbers in the largest array of the program, in the notation of StableHLO or of HLO."""
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", program) + re.findall(r"f32\[([\d,]+)\]", program)
    return max(np.prod([int(n) for n in re.findall(r"\d+", shape)]) for shape in shapes)


@pytest.mark.parametrize("form", ["chunkwise", "associative"])
@pytest.mark.slow
def test_never_holds_all_states(form):
    """No array of T D N numbers, forward or backward, as the parallel form has."""
    program, temporary = gradient_program(form)
    all_at_once, all_temporary = gradient_program("parallel")
    assert largest_array(program) <= LENGTH * DIM * STATES / 8
    assert largest_array(all_at_once) >= LENGTH * DIM * STATES
    assert temporary < all_temporary / 5


def test_default_form_of_an_accelerator(monkeypatch):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 3, 2), (1, 3, 2), (2, 4), (1, 3, 4), (1, 3, 4))]
    program = lambda form=None: str(jax.make_jaxpr(functools.partial(selective_scan, form=form))(*arguments))  # noqa: E731
    assert program() == program("chunkwise") != program("associative")
    monkeypatch.setattr(sys.modules[selective_scan.__module__], "platform", lambda: "gpu")
    assert program() == program("associative")


@pytest.mark.parametrize("argument", ["D", "A", "dt", "x"])
def test_bad_shapes(argument):
    arguments = {name: np.zeros((2, 5, 3), np.float32) for name in ("x", "dt")}
    arguments |= {name: np.zeros((2, 5, 4), np.float32) for name in "BC"}
    arguments |= {"A": np.zeros((3, 4), np.float32), "D": np.zeros(3, np.float32)}
    arguments[argument] = arguments[argument][..., None]
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        selective_scan(**arguments)
