"""The learning-rate schedule and AdamW with gradient clipping."""

from typing import Any

import optax
from ml_collections import ConfigDict

from effattn_jax.checks import fail

SCHEDULES = ("cosine", "wsd", "constant")


def default_config() -> ConfigDict:
    """The fields that `make_schedule` and `make_optimizer` read.

    schedule        "cosine", "wsd" (warm-up, stable, decay) or "constant"; each begins with the warm-up
    learning_rate   the peak, reached when the warm-up ends
    warmup_steps    steps of linear warm-up from 0; fewer than the run has
    final_fraction  learning rate at the end, as a fraction of the peak (cosine, wsd)
    decay_fraction  fraction of the run, at its end, over which wsd decays linearly
    clip_norm       largest global norm of the gradient; None or 0: no clipping
    b1, b2          decay of the moving averages of the gradient and of its square, in [0, 1)
    eps             added to the root of the second average
    weight_decay    decoupled weight decay, multiplied by the learning rate (Loshchilov and Hutter 2019)
    """
    return ConfigDict(
        {
            "schedule": "cosine",
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "final_fraction": 0.1,
            "decay_fraction": 0.2,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
        }
    )


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate of step s = 0, ..., steps - 1, with peak p, warm-up w, final fraction f:

    s < w      p s / w
    cosine     p (f + (1 - f) (1 + cos(pi (s - w) / (steps - w))) / 2)
    wsd        p, and from s0 = steps - d on, d = round(decay_fraction steps): p (1 - (1 - f) (s - s0) / d)
    constant   p

    Raises ValueError, naming the field, for a schedule that is not one of these or a number out of range.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule not in SCHEDULES:
        fail("schedule", repr(config.schedule), f"one of {', '.join(SCHEDULES)}")
    if steps < 1:
        fail("steps", steps, "at least 1")
    if not peak >= 0:
        fail("learning_rate", peak, "a number >= 0")
    if not 0 <= warmup < steps:
        fail("warmup_steps", warmup, f"a number from 0 to {steps - 1}: the run has {steps} steps")
    for field in ("final_fraction", "decay_fraction"):
        if not 0 <= config[field] <= 1:
            fail(field, config[field], "a number in [0, 1]")

    end = peak * config.final_fraction
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    decay = round(config.decay_fraction * steps)
    if warmup + decay > steps:
        fail("decay_fraction", config.decay_fraction, f"at most {(steps - warmup) / steps:g}: warm-up takes the rest")
    stable, fall = optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(decay, 1))
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def make_optimizer(config: ConfigDict, steps: int, decay_mask: Any = None) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW.

    Args:
      config: see `default_config`.
      steps: length of the run.
      decay_mask: pytree of bool like the parameters (or a function from parameters to one): which decay. None: all.
    """
    schedule = make_schedule(config, steps)
    clip_norm = config.clip_norm or 0.0
    for field, value in (("clip_norm", clip_norm), ("eps", config.eps), ("weight_decay", config.weight_decay)):
        if not value >= 0:
            fail(field, value, "a number >= 0")
    for field in ("b1", "b2"):
        if not 0 <= config[field] < 1:
            fail(field, config[field], "a number in [0, 1)")
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
