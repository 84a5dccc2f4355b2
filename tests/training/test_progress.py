import io

import pytest
from rich.console import Console

from effattn_jax.training.progress import TrainProgress, numbers_text, short_number


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(console, clock, steps=100, seconds=0.5, **options):
    with TrainProgress(steps, console=console, clock=clock, **options) as progress:
        for step in range(options.get("start", 0) + 1, steps + 1):
            clock.now += seconds
            progress.update(step, 5 / step, 12345.0, 0.412)
            if step == 30:
                progress.log("checkpoint [30] saved")


def test_plain_lines_every_ten_seconds_where_there_is_no_terminal():
    out = io.StringIO()
    run(Console(file=out, width=200), Clock())
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines.pop(2) == "checkpoint [30] saved"
    assert [line.split()[1] for line in lines] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert lines[1] == "step 21/100  loss 0.238  12.3k tok/s  MFU 41.2%  ETA 0:00:40"


def test_lines_are_not_folded_by_a_narrow_console():
    out = io.StringIO()
    run(Console(file=out, width=20), Clock())
    assert len(out.getvalue().splitlines()) == 7


def test_the_time_left_of_a_resumed_run_counts_only_its_own_steps():
    out = io.StringIO()
    run(Console(file=out, width=200), Clock(), seconds=20.0, steps=100, start=90)
    assert "step 91/100" in out.getvalue()
    first, second = out.getvalue().splitlines()[:2]
    assert "ETA" not in first  # nothing is known yet
    assert second.endswith("ETA 0:02:40")


def test_a_terminal_gets_one_live_line_and_whole_messages():
    out = io.StringIO()
    run(Console(file=out, width=120, force_terminal=True, _environ={}), Clock())
    text = out.getvalue()
    assert "checkpoint [30] saved" in text
    assert "step 21/100" not in text  # no plain lines besides the bar
    assert "100/100" in text
    assert "loss 0.050" in text
    assert "100%" in text
    assert "\x1b[2K" in text  # the line is drawn over, not repeated


def test_an_inactive_process_is_silent():
    out = io.StringIO()
    run(Console(file=out, force_terminal=True), Clock(), active=False)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (999.7, "1k"), (12345, "12.3k"), (4.56e6, "4.56M"), (1.2e9, "1.2G")]
)
def test_short_numbers(value, text):
    assert short_number(value) == text


def test_unknown_utilisation_and_time_are_left_out():
    assert numbers_text(1.0, 950.0, None, None) == "loss 1.000  950 tok/s"
