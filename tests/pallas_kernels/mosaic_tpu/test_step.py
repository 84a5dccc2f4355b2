"""The TPU kernel for one token, interpreted on a CPU, against the equation in float32."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.mosaic_tpu import step as module
from pallas_kernels.mosaic_tpu.step import step
from tests.pallas_kernels.step_cases import (
    KINDS,
    SCALE,
    check,
    check_is_one_pass,
    check_padding,
    draw,
    engine_of,
    loss_and_gradients,
)
from tests.ratio import FLOAT32, assert_close


def run(*, segment_ids=None, interpret=None, **inputs):
    return step(segment_ids=segment_ids, interpret=interpret or pltpu.InterpretParams(), **inputs)


@pytest.mark.parametrize("strength", ["mild", pytest.param("weak", marks=pytest.mark.slow), "extreme"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_is_the_recurrence(kind, strength):
    check(run, draw(kind, strength=strength))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(128, 128), (64, 192), pytest.param(256, 64, marks=pytest.mark.slow)]
)
def test_sizes(key_dim, value_dim):
    check(run, draw("bonus", key_dim, value_dim, batch=1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_rounded_inputs(kind, dtype):
    check(run, draw(kind, dtype=dtype))


@pytest.mark.parametrize("heads", [(2, 2, 4), (4, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.quick_cases(1)
def test_groups_of_heads(heads):
    check(run, draw("bonus", heads=heads))


def test_blocks_of_several_heads(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4 * 64 * 128 * 4)  # of nine heads they take three
    check(run, draw("bonus", heads=(3, 3, 3), batch=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_padding(kind):
    check_padding(run, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_steps_are_one_pass(kind):
    check_is_one_pass(kind, "mosaic_tpu")


def test_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check(run, draw("bonus", heads=(1, 2, 2)), interpret=interpret)
    assert "RACE" not in capfd.readouterr().out


def test_vmap():
    inputs, weights = draw("bonus")
    kernel, oracle = (
        functools.partial(run, scale=SCALE, interpret=True),
        functools.partial(engine_of(inputs), scale=SCALE),
    )
    queries = jnp.stack([inputs["q"], 2 * inputs["q"]])
    want, got = (
        jax.vmap(lambda q: loss_and_gradients(function, inputs | {"q": q}, weights))(queries)  # noqa: B023
        for function in (oracle, kernel)
    )
    assert_close(want, got, FLOAT32)


def test_shard_map():
    inputs, weights = draw("bonus", heads=(2, 2, 2))
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    tokens, state = P("rows", None, "heads"), P("rows", "heads")
    names = tuple(inputs)
    specs = tuple({"initial_state": state, "bonus": P("heads")}.get(name, tokens) for name in names)
    kernel = functools.partial(run, scale=SCALE)
    split = jax.shard_map(
        lambda *x: kernel(**dict(zip(names, x, strict=True))), mesh=mesh, in_specs=specs, out_specs=(tokens, state)
    )
    want = loss_and_gradients(kernel, inputs, weights)
    got = loss_and_gradients(lambda **x: split(*(x[name] for name in names)), inputs, weights)
    assert_close(want, got, FLOAT32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 96}, "needs multiples of 64 up to 256"),
        ({"value_dim": 320}, "needs multiples of 64 up to 256"),
        ({"batch": 0}, "is empty"),
    ],
)
def test_refusals_say_why(options, message):
    inputs, _ = draw("vector", **options)
    with pytest.raises(NotImplementedError, match=message):
        engine_of(inputs)(**inputs, implementation="mosaic_tpu")
