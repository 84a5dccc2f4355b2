import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effattn_jax.training.optimizer import default_config, make_optimizer, make_schedule

STEPS, WARMUP, PEAK, FINAL = 1000, 100, 3e-3, 0.1


def config(**changes):
    values = default_config()
    values.update(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=FINAL, **changes)
    return values


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 101, 550, 799, 800, 801, 999])
def test_schedules_follow_their_formulas(step):
    rise = PEAK * step / WARMUP
    cosine = PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2)
    decay = PEAK * (1 - (1 - FINAL) * (step - 800) / 200)
    wanted = {"cosine": cosine, "wsd": decay if step >= 800 else PEAK, "constant": PEAK}
    for name, value in wanted.items():
        got = make_schedule(config(schedule=name, decay_fraction=0.2), STEPS)(jnp.int32(step))
        np.testing.assert_allclose(got, rise if step < WARMUP else value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_without_warmup_the_first_step_has_the_peak(name):
    values = config(schedule=name)
    values.warmup_steps = 0
    assert float(make_schedule(values, 10)(0)) == pytest.approx(PEAK)
    assert float(make_schedule(values, 1)(0)) == pytest.approx(PEAK)


def test_wsd_without_decay_stays_at_the_peak():
    schedule = make_schedule(config(schedule="wsd", decay_fraction=0.0), STEPS)
    assert float(schedule(STEPS - 1)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "linear"),
        ("warmup_steps", 1000),
        ("warmup_steps", -1),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("final_fraction", 1.5),
        ("decay_fraction", -0.1),
        ("decay_fraction", 0.95),
        ("clip_norm", -1.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
    ],
)
def test_bad_values_are_refused_in_one_line(field, value):
    values = config(schedule="wsd")
    values[field] = value
    with pytest.raises(ValueError, match=f"^{field}: got .*; needs ") as error:
        make_optimizer(values, STEPS)
    assert "\n" not in str(error.value)


def test_steps_below_one_are_refused():
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        make_schedule(config(), 0)


def reference_adamw(params, gradients, values, decayed):
    """Plain NumPy, float64: Adam with bias correction, decoupled decay, clipping by the global norm."""
    mean, square = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))
        factor = min(1.0, values.clip_norm / norm) if values.clip_norm else 1.0
        rate = values.learning_rate
        for k, g in gradient.items():
            mean[k] = values.b1 * mean[k] + (1 - values.b1) * g * factor
            square[k] = values.b2 * square[k] + (1 - values.b2) * (g * factor) ** 2
            update = mean[k] / (1 - values.b1**t) / (np.sqrt(square[k] / (1 - values.b2**t)) + values.eps)
            params[k] = params[k] - rate * (update + (values.weight_decay * params[k] if decayed[k] else 0))
    return params


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("clip_norm", [0.5, 0, None])
def test_adamw_with_clipping_and_mask_follows_the_equations(clip_norm):
    values = config(schedule="constant", eps=1e-3)  # a large eps: Adam alone hardly notices the scale of gradients
    values.warmup_steps, values.clip_norm = 0, clip_norm
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 7), "scale": (7,)}
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    gradients = [{k: rng.normal(size=s) * scale for k, s in shapes.items()} for scale in (3.0, 0.01, 1.0)]
    decayed = {"kernel": True, "scale": False}

    optimizer = make_optimizer(values, STEPS, decayed)
    got = jax.tree.map(jnp.float32, params)
    state = optimizer.init(got)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, got)
        got = optax.apply_updates(got, updates)
    wanted = reference_adamw(dict(params), gradients, values, decayed)
    for name in shapes:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
