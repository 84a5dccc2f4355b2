"""The command line of descriptions."""

import json

import pytest
from absl import flags

from effattn_jax.models.sizes import format_bytes
from effattn_jax.pretrained.description import describe_config
from experiments import cli, model_flags
from experiments import describe as experiment
from tests.pretrained.tiny_checkpoint import CONFIG


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line with arguments; what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["describe", *arguments])
        flags.FLAGS["config"].unparse()
        flags.FLAGS.unparse_flags()
        cli.run(
            experiment.of_config,
            "What it does.",
            without_config=experiment.of_others,
            own_flags=(experiment.FLAGS, model_flags.FLAGS),
        )
        return capsys.readouterr().out

    return call


@pytest.fixture
def path(tmp_path):
    """A checkpoint of which only the config is there."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_what_is_printed(path, call):
    out = call(f"--checkpoint={path}", "--contexts=1000,30")
    found = describe_config(CONFIG, [30, 1000])
    head, *lines = out.strip().splitlines()
    assert head == str(path)
    assert lines[0].split() == ["layers", "2", "x", "attention", "+", "swiglu"]
    assert lines[1].split()[:2] == ["parameters", f"{found.parameters:,};"]
    assert lines[2].split()[:2] == ["active", f"{found.active_parameters:,};"]
    rows = [line.split() for line in lines[-2:]]
    assert [row[0] for row in rows] == ["30", "1,000"]
    assert [" ".join(row[3:5]) for row in rows] == [format_bytes(at.cache_bytes) for at in found.contexts]


def test_several_in_one_figure(path, call, tmp_path):
    figure = tmp_path / "memory.png"
    out = call(f"--checkpoint={path}", "--config=configs/quickstart.py", "--preset=mamba-130m", f"--output={figure}")
    assert [line for line in out.splitlines() if line and line[0] != " "] == [
        "quickstart",
        "mamba-130m",
        str(path),
        f"written: {figure}",
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert out.count("1,048,576") == 3  # the last row of each table
    assert out.count("524,288") == 0  # of the curve alone


def test_names_of_presets(call):
    assert "falcon-mamba-7b\n" in call("--presets")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "flags: got no --config, --checkpoint or --preset; needs"),
        (("--preset=gpt-5",), "preset: got 'gpt-5'; needs"),
        (("--checkpoint=nowhere",), "path_or_repo: got 'nowhere'; needs"),
        (("--checkpoint=configs",), "path: got no config.json in configs; needs"),
        (("--preset=mamba-130m", "--contexts=1k"), "--contexts: got 1k; needs"),
        (("--preset=mamba-130m", "--contexts=0"), "--contexts: got 0; needs"),
    ],
)
def test_errors(call, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("flops", "words"), [(999, "999"), (1000, "1 k"), (6.42e9, "6.42 G"), (1.57e11, "157 G"), (2.5e15, "2,500 T")]
)
def test_words_for_flops(flops, words):
    assert experiment.format_flops(flops) == words
