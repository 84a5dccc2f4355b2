"""The shared command line: help, overrides, one line for what is wrong."""

import pytest
from absl import flags

from configs.common import base
from experiments import cli


@pytest.fixture
def call(monkeypatch):
    """Call the command line with arguments; what reached the experiment."""

    def call(*arguments, main=None):
        seen = []
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        for name in list(flags.FLAGS):
            if name.startswith("config."):  # overrides of an earlier call
                delattr(flags.FLAGS, name)
        flags.FLAGS["config"].unparse()
        flags.FLAGS.unparse_flags()
        cli.run(main or (lambda config, workdir: seen.append((config, workdir))), "What it does.")
        return seen

    return call


QUICKSTART = "--config=configs/quickstart.py"


def test_overrides_reach_the_experiment(call):
    ((config, workdir),) = call(QUICKSTART, "--config.train.steps=7", "--config.model.mixers.local.window=5")
    assert config.train.steps == 7
    assert config.model.mixers.local.window == 5
    assert workdir.endswith("runs/quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUICKSTART, "--config.train.stpes=5"), "--config.train.stpes: no such field; near ones: train.steps"),
        ((QUICKSTART, "--config.trian.steps=5"), "--config.trian.steps: no such field; near ones: train.steps"),
        ((QUICKSTART, "--config.model.mixers.local.windw=5"), "near ones: model.mixers.local.window"),
        ((QUICKSTART, "--config.qqqq=1"), "--config.qqqq: no such field; --help lists the fields"),
        ((QUICKSTART, "--config.train.steps=many"), "--config.train.steps=many"),
        ((QUICKSTART, "--wrkdir=x"), "Unknown command line flag 'wrkdir'"),
        ((QUICKSTART, "train.steps=5"), "got the argument 'train.steps=5'"),
        (("--config=configs/quickstrt.py",), "--config: no such file: configs/quickstrt.py"),
        ((), "--config is needed"),
    ],
)
def test_one_line_for_what_is_wrong(call, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_help_shows_every_field_and_what_it_means(call, capsys):
    assert call("--help", QUICKSTART) == []
    out = capsys.readouterr().out
    assert "What it does." in out
    for field in cli._fields(base()):
        assert field.startswith(("model.mixers.", "optimizer.")) or f"{field} = " in out
    assert "into so many parts" in out or "microbatches" in out


def test_errors_of_the_users_world_are_one_line(call, capsys):
    def fails(config, workdir):
        raise FileNotFoundError("the data is not there")

    with pytest.raises(SystemExit) as ended:
        call(QUICKSTART, main=fails)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: the data is not there\n"
