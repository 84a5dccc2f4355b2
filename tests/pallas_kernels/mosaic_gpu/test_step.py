"""The Hopper kernel for one token, interpreted on a CPU and lowered for CUDA, against the equation in float32."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.export import DisabledSafetyCheck, export

from pallas_kernels.mosaic_gpu.step import step
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
    return step(segment_ids=segment_ids, interpret=interpret or plgpu.InterpretGPUParams(), **inputs)


@pytest.mark.parametrize("strength", ["mild", pytest.param("weak", marks=pytest.mark.slow), "extreme"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_is_the_recurrence(kind, strength):
    check(run, draw(kind, strength=strength))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [
        (128, 128),
        (64, 192),
        *(pytest.param(*dims, marks=pytest.mark.slow) for dims in [(64, 128), (256, 64), (192, 256)]),
    ],
)
def test_sizes(key_dim, value_dim):
    check(run, draw("bonus", key_dim, value_dim, heads=(1, 1, 1), batch=1))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_inputs(kind, dtype):
    check(run, draw(kind, dtype=dtype))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("heads", [(2, 2, 4), (4, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_groups_of_heads(heads):
    check(run, draw("bonus", heads=heads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_padding(kind):
    check_padding(run, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_steps_are_one_pass(kind):
    check_is_one_pass(kind, "mosaic_gpu")


@pytest.mark.slow
def test_vmap_is_rows():
    inputs, weights = draw("bonus", batch=3)
    bonuses = jnp.stack([inputs["bonus"], 2 * inputs["bonus"]])
    kernel, oracle = functools.partial(run, scale=SCALE), functools.partial(engine_of(inputs), scale=SCALE)

    def both(function):
        return lambda q, state, bonus: loss_and_gradients(
            function, inputs | {"q": q, "initial_state": state, "bonus": bonus}, weights
        )

    queries, states = jnp.stack([inputs["q"]] * 2), inputs["initial_state"]
    for axes in [(None, None, 0), (0, None, None)]:
        arguments = (queries if axes[0] == 0 else queries[0], states, bonuses if axes[2] == 0 else bonuses[0])
        want, got = (jax.vmap(both(function), axes)(*arguments) for function in (oracle, kernel))
        assert_close(want, got, FLOAT32)


def test_has_no_races():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    check(run, draw("bonus", 128, 128, heads=(1, 2, 2)), interpret=interpret)


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
        engine_of(inputs)(**inputs, implementation="mosaic_gpu")


def test_other_forms_are_refused():
    inputs, _ = draw("scalar")
    with pytest.raises(NotImplementedError, match="needs 'chunkwise', or one token"):
        engine_of(inputs)(**inputs, form="parallel", implementation="mosaic_gpu")


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_lowers_for_cuda_in_place(kind, dim):
    inputs, _ = draw(kind, dim, dim, dtype=jnp.bfloat16)
    state = inputs.pop("initial_state")
    donated = jax.jit(
        lambda state, inputs: step(**inputs, initial_state=state, segment_ids=None, scale=SCALE), donate_argnums=0
    )
    exported = export(donated, platforms=["cuda"], disabled_checks=[DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])
    program = exported(state, inputs).mlir_module()
    assert program.count("@mosaic_gpu_v2") == 1
    assert "output_operand_alias<output_tuple_indices = [1]" in program
    assert "tf.aliasing_output = 1" in program


def test_backward_lowers_for_cuda():
    inputs, weights = draw("bonus", dtype=jnp.bfloat16)
    both = jax.jit(
        lambda inputs: loss_and_gradients(functools.partial(step, segment_ids=None, scale=SCALE), inputs, weights)
    )
    checks = [DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    assert "@mosaic_gpu_v2" in export(both, platforms=["cuda"], disabled_checks=checks)(inputs).mlir_module()
