import jax
import jax.numpy as jnp

from effattn_jax.training.profile import ProfileWindow


def trace_files(path):
    return [file for file in path.rglob("*") if file.is_file()]


def run(window, first=0, last=6):
    step, x = jax.jit(lambda x: x @ x), jnp.ones((8, 8))
    with window:
        for i in range(first, last):
            window.step(i, x)
            x = step(x)


def test_only_the_window_is_traced(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda logdir: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with ProfileWindow(str(tmp_path), 2, 3, lambda line: None) as window:
        for i in range(8):
            window.step(i)
            calls.append(i)
    assert calls == [0, 1, "start", 2, 3, 4, "stop", 5, 6, 7]


def test_the_trace_is_written_and_named(tmp_path):
    lines = []
    run(ProfileWindow(str(tmp_path / "trace"), 2, 2, lines.append))
    assert lines == [f"profile written to {tmp_path / 'trace'}"]
    assert any(file.name.endswith(".xplane.pb") for file in trace_files(tmp_path / "trace"))


def test_a_run_that_ends_in_the_window_still_writes(tmp_path):
    lines = []
    run(ProfileWindow(str(tmp_path / "trace"), 4, 100, lines.append))
    assert len(lines) == 1
    assert trace_files(tmp_path / "trace")


def test_no_steps_no_trace(tmp_path):
    lines = []
    run(ProfileWindow(str(tmp_path / "trace"), 2, 0, lines.append))
    run(ProfileWindow(str(tmp_path / "trace"), 2, 2, lines.append), first=4)
    assert lines == []
    assert not (tmp_path / "trace").exists()
