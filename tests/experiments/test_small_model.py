"""Training many small models at once: the best is reported, and a solved task ends the run."""

import jax
import jax.numpy as jnp
import pytest

from experiments.small_model import Batch, SmallModel, fit


def previous_token(key):
    """Say the token before: a convolution of two taps knows it."""
    tokens = jax.random.randint(key, (16, 12), 0, 4)
    return Batch(tokens, jnp.roll(tokens, 1, axis=1), jnp.broadcast_to(jnp.arange(12) > 0, tokens.shape))


def train(conv_width, **options):
    def make(rngs):
        sizes = {"vocab_size": 4, "answers": 4, "dim": 16, "mlp_dim": 32, "layers": 1, "conv_width": conv_width}
        return SmallModel("mamba2", {"head_dim": 16, "state_dim": 2, "conv_width": 1}, **sizes, rngs=rngs)

    tests = {"rows": previous_token(jax.random.key(9))}
    return fit(make, previous_token, tests, **{"warmup": 10, "every": 50} | options)


@pytest.mark.slow
def test_a_solved_task_ends_the_run_and_the_best_model_is_reported():
    """A learning rate of nothing leaves the other one as the best."""
    found = train(2, learning_rates=(1e-9, 1e-2), seeds=2, steps=1000)
    assert found.accuracy["rows"] >= 0.995
    assert found.learning_rate == pytest.approx(1e-2)
    assert found.steps % 50 == 0
    assert found.steps < 1000


@pytest.mark.slow
def test_steps_are_a_limit():
    found = train(2, learning_rates=(1e-9,), steps=7)
    assert found.steps == 7
    assert found.accuracy["rows"] < 0.9
