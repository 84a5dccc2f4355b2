"""Cross entropy in chunks against log_softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.models import token_losses
from tests.layers.catalogue import agree, jit, random
from tests.models.tiny import equations

BATCH, LENGTH, DIM, VOCAB = 2, 5, 7, 30


def arguments():
    targets = np.random.default_rng(0).integers(VOCAB, size=(BATCH, LENGTH))
    targets[0, :2] = 0, VOCAB - 1
    return 4 * random("hidden", BATCH, LENGTH, DIM), random("head", VOCAB, DIM), targets


def reference(hidden, head, targets):
    scores = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


def with_gradients(f):
    weights = random("weights", BATCH, LENGTH)

    def run(hidden, head, targets):
        loss = lambda hidden, head: jnp.sum(weights * f(hidden, head, targets))  # noqa: E731
        return f(hidden, head, targets), jax.grad(loss, argnums=(0, 1))(hidden, head)

    return jit(run)


@pytest.mark.parametrize("chunk", [1, 4, 7, 10, 15, 29, 30, 31, 8192])
@pytest.mark.quick_cases(1)
def test_values_and_gradients(chunk):
    want, want_gradients = with_gradients(reference)(*arguments())
    got, gradients = with_gradients(lambda *a: token_losses(*a, chunk=chunk))(*arguments())
    agree(want, got, "value", limit=1e-6)
    for name, a, b in zip(("hidden", "head"), want_gradients, gradients, strict=True):
        agree(a, b, name, limit=2e-6)


def test_large_scores_stay_finite():
    hidden, head, targets = arguments()
    want, _ = with_gradients(reference)(1e3 * hidden, head, targets)
    got, gradients = with_gradients(lambda *a: token_losses(*a, chunk=7))(1e3 * hidden, head, targets)
    agree(want, got)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_scores_are_summed_in_float32():
    hidden, head, targets = arguments()
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    got = token_losses(hidden, head, targets, chunk=7)
    assert got.dtype == jnp.float32
    agree(reference(hidden.astype(jnp.float32), head.astype(jnp.float32), targets), got, limit=1e-6)


def largest(f):
    hidden, head, targets = arguments()
    loss = lambda hidden, head: jnp.sum(f(hidden, head, targets))  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head).jaxpr
    tokens = BATCH * LENGTH
    shapes = [v.aval.shape for e in equations(jaxpr) for v in e.outvars]
    return max((int(np.prod(s)) // tokens for s in shapes if s[:2] == (BATCH, LENGTH)), default=0), shapes


def test_all_scores_never_exist_at_once():
    """In no equation of the gradient, those inside loops included: as one array [B, T, vocab] or as stacked chunks."""
    assert largest(reference)[0] == VOCAB
    widest, shapes = largest(lambda *a: token_losses(*a, chunk=8))
    assert widest <= 8
    assert max(int(np.prod(shape)) for shape in shapes) < BATCH * LENGTH * VOCAB
