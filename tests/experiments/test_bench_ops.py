"""The cases of bench_ops on a CPU: each runs, and what it counts is what a hand counts. Nothing is timed."""

import dataclasses
import json
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import bench_ops, bench_peers, sanitize_kernels
from experiments.bench_cases import (
    OPERATIONS,
    Example,
    Work,
    error_of_example,
    errors,
    forward,
    gradients,
    visible_pairs,
    with_cotangent,
    work,
)
from experiments.report import write_report
from experiments.timing import Time

WITHOUT_GPU = pytest.mark.skipif(jax.default_backend() == "gpu", reason="would run for minutes")

# At B2 T8 H3 D4 an array of tokens in bfloat16 has 384 bytes, gates in float32 192 by token and 768 by channel.
COUNTS = {
    "scalar_decay, gate per token": {
        "forward": Work(4 * 384 + 192, 48 * (2 * 64 * 4 + 4 * 16)),
        "forward_backward": Work(2 * (4 * 384 + 192) + 3 * 384 + 192, 3 * 27648),
    },
    "scalar_decay, gate per head": {  # no gradient of the three gates
        "forward": Work(4 * 384 + 12, 27648),
        "forward_backward": Work(2 * (4 * 384 + 12) + 3 * 384, 3 * 27648),
    },
    "vector_decay": {
        "forward": Work(4 * 384 + 768, 48 * (2 * 64 * 4 + 4 * 16)),
        "forward_backward": Work(2 * (4 * 384 + 768) + 3 * 384 + 768, 3 * 27648),
    },
    "vector_decay, bonus": {
        "forward": Work(4 * 384 + 768 + 48, 27648),
        "forward_backward": Work(2 * (4 * 384 + 768 + 48) + 3 * 384 + 768 + 48, 3 * 27648),
    },
    "attention, causal": {  # 36 pairs a head
        "forward": Work(4 * 384, 4 * 6 * 4 * 36),
        "forward_backward": Work(8 * 384 + 3 * 384, 3.5 * 3456),
    },
    "attention, window 1024": {
        "forward": Work(4 * 384, 3456),
        "forward_backward": Work(8 * 384 + 3 * 384, 3.5 * 3456),
    },
    "step, scalar_decay": {"forward": Work(2 * 384, 4 * 6 * 16)},  # the state: 6 x 4 x 4 in float32
    "step, vector_decay": {"forward": Work(2 * 384, 4 * 6 * 16)},
}


def inputs_of(op):
    return op.inputs(2, 1 if op.carried else 8, 3, 4, 2.0)


def test_every_case_is_counted():
    assert OPERATIONS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.quick_cases(1)
def test_bytes_and_products(name):
    op = OPERATIONS[name]
    assert work(op, inputs_of(op)) == COUNTS[name]


def test_visible_pairs():
    assert [visible_pairs(8, window) for window in (None, 8, 100, 3, 1)] == [36, 36, 36, 1 + 2 + 6 * 3, 8]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.quick_cases(1)
def test_the_call_runs(name):
    op = OPERATIONS[name]
    inputs, call = inputs_of(op), forward(op, implementation="xla")
    if op.carried:
        out, state = jax.jit(call)(inputs)
        assert out.shape == (2, 1, 3, 4)
        assert state.shape == inputs["initial_state"].shape
        return
    out, found = jax.jit(gradients(call, op.constant))(with_cotangent(call, inputs))
    assert out.shape == (2, 8, 3, 4)
    assert found.keys() == inputs.keys() - {*op.constant}
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (out, *found.values()))


@pytest.mark.parametrize("name", ["attention, window 1024", "step, vector_decay"])
@pytest.mark.slow
def test_hard_inputs_have_small_errors(name):
    found = errors(OPERATIONS[name], "xla", 16)
    assert found.keys() == ({"out", "state"} if "step" in name else {"out", "gradients", "gates"})


def test_what_an_example_gives_is_checked():
    op = OPERATIONS["attention, causal"]
    prepare = op.examples["jax_example"].prepare
    inputs = prepare(inputs_of(op))
    chex.assert_type(list(inputs.values()), jnp.float16)
    call = lambda x: forward(op, implementation="xla", scale=1.0)(x).astype(jnp.float32)  # noqa: E731
    for scale, error in ((1.0, None), (1.1, "out: error .*; limit 0.005")):
        example = Example(prepare, lambda x, scale=scale: scale * call(x))
        wrong = dataclasses.replace(op, examples={"a": example})
        if error is None:
            assert error_of_example(wrong, "a", 16)["out"] < 5e-3
            continue
        with pytest.raises(ValueError, match=error):
            error_of_example(wrong, "a", 16)


def test_an_error_above_its_limit_is_told(monkeypatch):
    monkeypatch.setattr("experiments.bench_cases.LIMITS", {"out": 0.0, "state": 0.0})
    with pytest.raises(ValueError, match=r"gate 6\.0, out: error .*; limit 0\.0"):
        errors(OPERATIONS["step, scalar_decay"], "xla", 16)


@pytest.fixture(autouse=True)
def no_flags():
    yield
    for name in bench_ops.FLAGS:
        bench_ops.FLAGS[name].unparse()


def cases(*arguments):
    for name in bench_ops.FLAGS:
        bench_ops.FLAGS[name].unparse()
    bench_ops.FLAGS(["bench_ops", *arguments])
    return bench_ops.cases()


def test_cases_of_a_command_line(capsys):
    asked = cases("--baseline", "--triton", "--op=scalar_decay, gate per token", "--op=step, vector")
    assert asked[0] == ("scalar_decay, gate per token", (4, 8192, 16, 128), "mosaic_gpu")
    assert ("step, vector_decay", (64, 1, 16, 128), "xla") in asked
    assert [implementation for *_, implementation in asked] == 7 * ["mosaic_gpu"] + 7 * ["xla"] + 4 * ["triton"]
    long = "--shape=1,65536,16,128"
    assert ("attention, causal", (1, 65536, 16, 128), "mosaic_gpu") not in cases()
    assert "left out: attention, causal at 1,65536,16,128, too slow for XLA" in capsys.readouterr().out
    assert len(cases(long, "--op=attention, causal")) == 1
    others = [implementation for *_, implementation in cases(long, "--op=attention, causal", "--baseline")[1:]]
    assert others == ["xla", "cudnn", "jax_example"]
    assert cases(long, "--op=step") == []


def test_recorded_peers():
    assert bench_peers.recorded(("fla.retention",), (4, 8192, 16, 128)) == (0.3835, 1.6618)
    assert bench_peers.recorded(("nobody", "sdpa.cudnn"), (8, 2048, 16, 128)) == (0.2849, 1.1457)
    assert bench_peers.recorded((), (8, 2048, 16, 128)) == (None, None)


def test_rows_are_shown_and_plotted(tmp_path, capsys):
    forward_only = {f"forward_{x}": 0.5 for x in ("ms", "spread", "TBps", "TFLOPs", "share_of_floor", "first_call_s")}
    row = {"op": "step, x", "shape": "1,1,1,64", "implementation": "xla", "errors": {"out": 1e-3}, **forward_only}
    row |= {"forward_floor_ms": None} | bench_ops.peer(OPERATIONS["step, scalar_decay"], (1, 1, 1, 64), same_run=False)
    full = row | {x.replace("forward", "forward_backward"): y for x, y in forward_only.items()}
    full |= {"forward_backward_floor_ms": 0.1, "peer_forward_ms": 0.25, "peer_source": "peers_h200.json"}
    for shown in (row, full):
        bench_ops.show(shown)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "0.250*" in lines[1]
    assert "out 1.0e-03" in lines[0]
    bench_ops.plot(str(tmp_path / "bench_ops.png"), [row, full])
    assert (tmp_path / "bench_ops.png").stat().st_size > 0
    write_report(str(tmp_path / "table.json"), "experiments.bench_ops", [row, full], failures=[])
    assert json.loads((tmp_path / "table.json").read_text())["rows"][1]["peer_forward_ms"] == 0.25


def test_a_failure_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    def times(op, shape, implementation):
        if implementation == "cudnn":
            raise NotImplementedError("no cuDNN\nhere")
        return {part: Time(2.0, 0.01, 3.0) for part in work(op, op.inputs(*shape, 2.0))}

    monkeypatch.setattr(bench_ops, "only_on_a_gpu", lambda script: None)
    monkeypatch.setattr(bench_ops, "errors", lambda *case: {"out": 1e-3})
    monkeypatch.setattr(bench_ops, "error_of_example", lambda *case: {"out": 2e-3})
    monkeypatch.setattr(bench_ops, "times", times)
    output = f"--output={tmp_path}"
    monkeypatch.setattr(
        sys, "argv", ["bench_ops", "--baseline", output, "--op=attention, causal", "--op=step", "--shape=1,8,2,4"]
    )
    assert bench_ops.main() == 1
    table = json.loads((tmp_path / "bench_ops.json").read_text())
    [failure] = table["failures"]
    assert failure == "FAILED attention, causal, 1,8,2,4, cudnn: NotImplementedError: no cuDNN here"
    assert failure in capsys.readouterr().out
    assert [row["implementation"] for row in table["rows"]] == ["mosaic_gpu", "xla", "jax_example"]
    assert table["rows"][0]["forward_backward_ms"] == 2.0
    assert [row["errors"] for row in table["rows"]] == [{"out": 1e-3}, None, {"out": 2e-3}]
    assert {"device", "jax", "command"} <= table.keys()
    assert {"device", "peer_source", "forward_TBps"} <= table["rows"][0].keys()


@WITHOUT_GPU
def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_ops"])
    with pytest.raises(SystemExit, match=r"\Abench_ops needs an NVIDIA GPU; JAX's backend here is cpu\Z"):
        bench_ops.main()
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    with pytest.raises(SystemExit, match=r"\Asanitize_kernels needs an NVIDIA GPU"):
        sanitize_kernels.main([])


@pytest.mark.skipif(not bench_peers.missing(), reason="the peers are here")
def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_ops", "--peers"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with pytest.raises(SystemExit, match=r"not installed: .*fla-core, flash-linear-attention\Z"):
        bench_ops.main()
