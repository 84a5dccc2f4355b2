"""The contract of a mechanism, checked for every engine and every form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.linear import oracle
from tests.linear.engines import ENGINES, every_engine, every_form, every_kernel, every_map, every_other_form
from tests.linear.packings import PACKINGS, row
from tests.linear.suite import (
    STRENGTHS,
    Result,
    Sizes,
    apply,
    arguments_of,
    assert_results_close,
    astype,
    cast,
    draw_problem,
    forward,
    is_float,
    jit,
    loss,
    reference,
    result,
    run,
    with_integers,
)
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, assert_close, error_ratio

MAIN = Sizes()
CASES = [  # (length, key_dim, value_dim); those of Engine.main are others
    (0, 16, 50),
    (1, 50, 16),
    (65, 64, 100),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(15, 100, 64), (63, 128, 256), (64, 256, 128)]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(100, 16, 64), (500, 50, 100)]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1024, 64, 50), (2048, 50, 64)]),
]
every_packing = pytest.mark.parametrize("packing", PACKINGS)
every_strength = pytest.mark.parametrize("strength", STRENGTHS)


@every_engine
@every_other_form
@pytest.mark.parametrize(("length", "key_dim", "value_dim"), CASES)
def test_forms_agree_with_recurrent(engine, form, length, key_dim, value_dim):
    heads = tuple(min(2, heads) for heads in engine.main.heads)
    sizes = Sizes(length, key_dim, value_dim, batch=1, heads=heads)
    for strength in STRENGTHS:
        problem = draw_problem(engine, sizes, strength)
        assert_results_close(engine, reference(engine, problem), run(engine, form, problem), *engine.limits)


@every_engine
@every_form
@every_strength
def test_forms_agree_over_strengths(engine, form, strength):
    problem = draw_problem(engine, engine.main, strength)
    assert_results_close(engine, reference(engine, problem), run(engine, form, problem), *engine.limits)


@every_engine
@every_other_form
def test_no_initial_state_is_zeros(engine, form):
    problem = draw_problem(engine, engine.main)
    if engine.fresh is None:
        start = jax.tree.map(np.zeros_like, problem.initial_state)
    else:
        fresh = engine.fresh(problem.inputs)
        start = jax.tree.map(lambda x: np.stack([x] * engine.main.batch), fresh)
        start = jax.tree.map(lambda x: x.astype(np.float32) if is_float(x) else x, start)
    want = reference(engine, problem._replace(initial_state=start))
    got = run(engine, form, problem._replace(initial_state=None))
    del want.grads["initial_state"]
    if engine.fresh is None:
        assert_results_close(engine, want, got, *engine.limits)
    else:  # the gradient of the state is now part of those of the inputs it is made of
        assert_close((want.out, want.state), (got.out, got.state), engine.limits[0])


@every_engine
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunk_sizes(engine, chunk):
    for packing, strength in (("straddling", "strong"), ("padding", "mild")):
        problem = draw_problem(engine, engine.main, strength, PACKINGS[packing])
        assert_results_close(engine, reference(engine, problem), run(engine, chunk, problem), *engine.limits)


@every_engine
@every_form
@every_strength
def test_float64_equals_numpy(engine, form, strength):
    problem = draw_problem(engine, engine.main, strength)
    with jax.enable_x64(True):
        problem = astype(problem, np.float64)
        want, got = run(engine, "recurrent", problem), run(engine, form, problem)
        assert {x.dtype for x in jax.tree.leaves((got.out, got.state)) if is_float(x)} == {np.dtype(np.float64)}
        assert_close(oracle.unpacked(engine, problem.inputs, problem.initial_state), (got.out, got.state), 1e-12)
        assert_close(want.grads, got.grads, 1e-11)


@every_engine
@every_form
def test_bfloat16(engine, form):
    problem = cast(engine, draw_problem(engine, engine.main), jnp.bfloat16)
    got = run(engine, form, problem)
    assert got.out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(got.state) if is_float(x)} == {np.dtype(np.float32)}
    assert_results_close(engine, reference(engine, problem), got, BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE)


@every_engine
@every_form
@every_packing
def test_packed_documents_equal_separate_rows(engine, form, packing):
    problem = draw_problem(engine, engine.main, "mild", PACKINGS[packing])
    got = run(engine, form, problem)
    want = oracle.packed(engine, problem.inputs, problem.initial_state, problem.segment_ids)
    assert_close(want, (got.out, got.state), engine.limits[0])
    assert not got.out[problem.segment_ids < 0].any()


@every_engine
@every_form
@every_packing
@every_strength
def test_forms_agree_on_packed_documents(engine, form, packing, strength):
    problem = draw_problem(engine, engine.main, strength, PACKINGS[packing])
    assert_results_close(engine, reference(engine, problem), run(engine, form, problem), *engine.limits)


@every_engine
@every_form
def test_right_padding_changes_nothing(engine, form):
    length = 137
    ids = np.stack([row((0, length), (-1, engine.main.length - length))] * engine.main.batch)
    problem = draw_problem(engine, engine.main, segment_ids=ids)
    other = draw_problem(engine, engine.main, seed=1)
    mixed = {
        name: x if name in engine.static else np.concatenate([x[:, :length], other.inputs[name][:, length:]], 1)
        for name, x in problem.inputs.items()
    }
    want, got = run(engine, form, problem), run(engine, form, problem._replace(inputs=mixed))
    jax.tree.map(np.testing.assert_array_equal, want, got)
    real = {name: engine.take(name, x, tokens=slice(length)) for name, x in problem.inputs.items()}
    out, state = oracle.unpacked(engine, real, problem.initial_state)
    assert_close((out, state), (got.out[:, :length], got.state), engine.limits[0])
    for name in real.keys() - engine.static:
        assert not got.grads[name][:, length:].any(), name


@every_engine
@every_form
@pytest.mark.parametrize(
    "lengths", [(49,) * 4, *(pytest.param(x, marks=pytest.mark.slow) for x in [(1, 195), (64, 132), (133, 0, 63)])]
)
def test_splitting_equals_one_pass(engine, form, lengths):
    problem = draw_problem(engine, engine.main)
    outs, state, start = [], problem.initial_state, 0
    for length in lengths:
        part = {name: engine.take(name, x, tokens=slice(start, start + length)) for name, x in problem.inputs.items()}
        out, state = forward(engine, form, part, state)
        outs.append(out)
        start += length
    assert_close(
        oracle.unpacked(engine, problem.inputs, problem.initial_state),
        (jnp.concatenate(outs, 1), state),
        engine.limits[0],
    )


@every_engine
@every_form
@pytest.mark.parametrize("last", [0, 63, 64, 100, 194])
def test_no_gradient_reaches_later_tokens(engine, form, last):
    problem = draw_problem(engine, engine.main)
    token = np.arange(engine.main.length).reshape(-1, *(1,) * (problem.d_out.ndim - 2))
    d_out, d_state = np.where(token == last, problem.d_out, 0), jax.tree.map(np.zeros_like, problem.d_state)
    grads = run(engine, form, problem._replace(d_out=d_out, d_state=d_state)).grads
    for name in problem.inputs.keys() - engine.static:
        assert not grads[name][:, last + 1 :].any(), name
    for name in engine.read:
        assert np.abs(grads[name][:, last]).min() > 0, name


@pytest.mark.parametrize(
    ("engine", "heads"),
    [
        pytest.param(e, heads, id=f"{e.name}-{heads}", marks=[pytest.mark.slow] if i or e.variant else [])
        for e in ENGINES
        for i, heads in enumerate(e.groups)
    ],
)
@every_form
def test_fewer_heads_are_repeated(engine, form, heads):
    problem = draw_problem(engine, engine.main._replace(heads=heads))
    repeats = {name: max(heads) // h for name, h in zip("qkv", heads, strict=True)}
    full = {
        name: np.repeat(x, repeats.get(name, 1), axis=2) if name in repeats else x for name, x in problem.inputs.items()
    }
    want, got = run(engine, form, problem._replace(inputs=full)), run(engine, form, problem)
    grads = dict(want.grads)
    for name, times in repeats.items():
        x = grads[name]
        grads[name] = x.reshape(*x.shape[:2], -1, times, x.shape[3]).sum(3)
    assert_results_close(engine, Result(want.out, want.state, grads), got, *engine.limits)
    assert_close(oracle.unpacked(engine, problem.inputs, problem.initial_state), (got.out, got.state), engine.limits[0])


@every_engine
@every_form
def test_rows_and_heads_do_not_mix(engine, form):
    problem = draw_problem(engine, engine.main)
    heads = np.roll(np.arange(max(engine.main.heads)), 1)

    def permute(name, x):
        axis = 1 if name == "initial_state" else engine.head_axis(name)
        if axis is not None and axis < x.ndim:
            x = x.take(heads, axis)
        return x if name in engine.static else x[::-1]

    states = lambda tree: jax.tree.map(lambda x: permute("initial_state", x), tree)  # noqa: E731
    permuted = problem._replace(
        inputs={name: permute(name, x) for name, x in problem.inputs.items()},
        initial_state=states(problem.initial_state),
        d_out=permute("out", problem.d_out),
        d_state=states(problem.d_state),
    )
    want, got = run(engine, form, problem), run(engine, form, permuted)
    grads = {name: states(x) if name == "initial_state" else permute(name, x) for name, x in want.grads.items()}
    assert_results_close(engine, Result(permute("out", want.out), states(want.state), grads), got, 2e-6)


@every_engine
@every_form
@pytest.mark.parametrize("length", [1, 65])
def test_extreme_gates_stay_finite(engine, form, length):
    problem = draw_problem(engine, Sizes(length, *((50, 16) if length == 1 else (64, 100)), 1, (2, 2, 2)), "extreme")
    for x in jax.tree.leaves(run(engine, form, problem)):
        assert np.isfinite(x).all()


@every_engine
@every_form
def test_extreme_gates_stay_finite_in_packed_rows(engine, form):
    for ids in PACKINGS.values():
        problem = draw_problem(engine, engine.main, "extreme", ids)
        for x in jax.tree.leaves(run(engine, form, problem)):
            assert np.isfinite(x).all()


@every_engine
@every_form
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_jit_changes_nothing(engine, form, length):
    problem = draw_problem(engine, engine.main._replace(length=length, batch=1))
    want = apply(engine, form, problem.inputs, problem.initial_state)
    assert_close(want, forward(engine, form, problem.inputs, problem.initial_state), 1e-6)


@every_engine
@pytest.mark.parametrize(("length", "form"), [(1, "recurrent"), (3, "chunkwise")])
def test_default_form(engine, length, form):
    problem = draw_problem(engine, engine.main._replace(length=length, batch=1))
    programs = [
        str(jax.make_jaxpr(partial(apply, engine, f))(problem.inputs, problem.initial_state)) for f in (None, form)
    ]
    assert programs[0] == programs[1]


@every_engine
@every_form
def test_vmap_and_checkpoint(engine, form):
    problems = [draw_problem(engine, engine.main, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *problems)

    again = partial if engine.is_interpreted else jax.checkpoint

    @jit
    @jax.vmap
    def gradient(problem):
        return jax.grad(again(partial(loss, engine, form)), has_aux=True)(arguments_of(problem), problem)

    grads, (out, state) = gradient(stacked)
    for i, problem in enumerate(problems):
        got = jax.tree.map(lambda x, i=i: x[i], Result(out, state, grads))
        assert_results_close(engine, run(engine, form, problem), got, *engine.limits)


@every_engine
@pytest.mark.parametrize("form", [pytest.param("recurrent", marks=pytest.mark.slow), "parallel", "chunkwise"])
def test_second_derivative_equals_difference_of_gradients(engine, form):
    step = 1e-5
    with jax.enable_x64(True):
        problem, direction = (astype(draw_problem(engine, engine.main, seed=seed), np.float64) for seed in (0, 1))
        tangent = arguments_of(direction)

        @jit
        def second(problem):
            gradient = jax.grad(partial(loss, engine, form), has_aux=True)
            products = lambda a: jax.tree.map(jnp.vdot, gradient(a, problem)[0], tangent)  # noqa: E731
            inner = lambda a: sum(jax.tree.leaves(products(a)))  # noqa: E731
            return jax.grad(inner)(arguments_of(problem))

        def grads_at(distance):
            moved = jax.tree.map(lambda x, t: x + distance * t, arguments_of(problem), tangent)
            state = with_integers(moved.pop("initial_state"), problem.initial_state)
            return run(engine, form, problem._replace(inputs=moved, initial_state=state)).grads

        want = jax.tree.map(lambda a, b: (a - b) / (2 * step), grads_at(step), grads_at(-step))
        assert_close(want, second(problem), 1e-6)


@every_engine
@every_form
@pytest.mark.parametrize(
    "axes",
    [
        ("rows", "heads"),
        pytest.param(("rows", None), marks=pytest.mark.slow),
        pytest.param((None, "heads"), marks=pytest.mark.slow),
    ],
)
def test_shard_map(engine, form, axes):
    rows, heads = axes
    problem = draw_problem(engine, engine.main)._replace(initial_state=None)
    shape = (2 if rows else 1, 2 if heads else 1)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[: shape[0] * shape[1]]).reshape(shape), ("rows", "heads"))
    spec = jax.sharding.PartitionSpec
    sequence = spec(rows, None, heads)
    state = jax.tree.map(lambda x: spec(*(rows, heads)[: x.ndim]), problem.d_state)

    def of(name):
        axes = (None,) if name in engine.static else (rows, None, None)
        axis = engine.head_axis(name)
        return spec(*(heads if i == axis else mesh_axis for i, mesh_axis in enumerate(axes)))

    inputs = {name: of(name) for name in problem.inputs}
    specs = problem._replace(inputs=inputs, d_out=sequence, d_state=state)
    sharded = jax.shard_map(
        partial(result, engine, form), mesh=mesh, in_specs=(specs,), out_specs=Result(sequence, state, inputs)
    )
    assert_results_close(engine, run(engine, form, problem), jit(sharded)(problem), *engine.limits)


def _temporary_bytes(engine, form, length):
    sizes = Sizes(length, 32, 32, batch=1, heads=(2, 2, 2))
    return run.lower(engine, form, draw_problem(engine, sizes)).compile().memory_analysis().temp_size_in_bytes


@every_engine
def test_chunkwise_memory_is_linear_in_length(engine):
    assert _temporary_bytes(engine, "chunkwise", 2048) < 5 * _temporary_bytes(engine, "chunkwise", 512)


@every_engine
def test_recurrent_keeps_no_state_per_token(engine):
    length = 1024
    problem = draw_problem(engine, Sizes(1, 32, 32, batch=1, heads=(2, 2, 2)))
    state = sum(x.nbytes for x in jax.tree.leaves(problem.initial_state))
    assert _temporary_bytes(engine, "recurrent", length) < length * state


@every_engine
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.slow
def test_long_run_does_not_drift(engine, form):
    for strength in ("weak", "strong"):
        problem = draw_problem(engine, Sizes(engine.longest, 8, 6, batch=1, heads=(1, 1, 1)), strength)
        out, state = oracle.unpacked(engine, problem.inputs, problem.initial_state)
        got, got_state = forward(engine, form, problem.inputs, problem.initial_state)
        limit = max(1e-3, engine.limits[0])
        assert_close((out, state), (got, got_state), limit)
        assert error_ratio(out[:, -64:], got[:, -64:]) <= limit


def _without_token(x):
    return x[:, :-1]


QKV = {  # argument, what is done to it
    "k of other length": ("k", _without_token),
    "k of other width": ("k", lambda x: x[..., :-1]),
    "k without heads": ("k", lambda x: x[:, :, 0]),
    "v of other length": ("v", _without_token),
    "v of other batch": ("v", lambda x: x[:1]),
    "integer q": ("q", lambda x: x.astype(np.int32)),
    "heads that do not divide": ("q", lambda x: x[:, :, :3]),
}
BAD = {
    "state of other shape": ("initial_state", lambda x: jax.tree.map(lambda x: x[..., :-1], x)),
    "integer state": ("initial_state", lambda x: jax.tree.map(lambda x: x.astype(np.int32), x)),
    "segment ids of other shape": ("segment_ids", _without_token),
    "float segment ids": ("segment_ids", lambda x: x.astype(np.float32)),
    "segment ids that decrease": ("segment_ids", lambda x: x[:, ::-1]),
    "unknown form": ("form", lambda x: "sideways"),
    "unknown implementation": ("implementation", lambda x: "abacus"),
    "unknown implementation in a list": ("implementation", lambda x: ("xla", "abacus")),
    "no implementation": ("implementation", lambda x: ()),
}


@every_engine
def test_bad_arguments(engine):
    problem = draw_problem(engine, MAIN, segment_ids=PACKINGS["straddling"])
    cases = BAD | dict(engine.bad) | (QKV if {"q", "k", "v"} <= problem.inputs.keys() else {})
    for case, (argument, spoil) in cases.items():
        arguments = problem.inputs | {"initial_state": problem.initial_state, "segment_ids": problem.segment_ids}
        arguments |= {"form": None}
        arguments[argument] = spoil(arguments.get(argument))
        with pytest.raises(ValueError, match=rf"\b{argument}\S* got .+; needs .+") as error:
            engine.function(**arguments)
        assert "\n" not in str(error.value), case


@every_kernel
def test_kernels_say_what_they_refuse(engine):
    problem = draw_problem(engine, engine.main._replace(length=5))
    arguments = problem.inputs | {"initial_state": problem.initial_state}
    for reason, change in engine.refuses.values():
        with pytest.raises(NotImplementedError, match=reason):
            engine.function(**change(arguments))


@every_kernel
def test_kernels_refuse_second_derivatives(engine):
    problem = draw_problem(engine, engine.main._replace(length=5))
    gradient = jax.grad(partial(loss, engine, "chunkwise"), has_aux=True)
    with pytest.raises(NotImplementedError, match="ifferentia"):
        jax.make_jaxpr(jax.grad(lambda a: gradient(a, problem)[0]["v"].sum()))(arguments_of(problem))


@every_map
@pytest.mark.parametrize("packing", [None, "straddling"])
def test_affine_maps_compose_to_one_pass(engine, packing):
    """The map of the whole is the map of a part after that of the part before it; applied, it is the final state.
    A document may go on from part to part, as here; that one ends exactly there the maps cannot know."""
    ids = None if packing is None else PACKINGS[packing]
    problem = draw_problem(engine, engine.main, "strong", ids)
    cut, parts = 70, []
    for tokens in (slice(None, cut), slice(cut, None)):
        part = {name: engine.take(name, x, tokens=tokens) for name, x in problem.inputs.items()}
        parts.append(jit(engine.map)(part, None if ids is None else ids[:, tokens]))
    assert_close(jit(engine.map)(problem.inputs, ids), parts[1].after(parts[0]), engine.limits[0])
    _, state = forward(engine, "recurrent", problem.inputs, problem.initial_state, ids)
    assert_close(state, parts[1](parts[0](problem.initial_state)), engine.limits[0])
