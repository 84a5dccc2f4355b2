"""The command line of evaluation, on a small checkpoint."""

import importlib.util

import pytest
from absl import flags

from effattn_jax.pretrained import load, load_tokenizer
from effattn_jax.pretrained.text_evaluation import evaluate_texts
from experiments import cli, model_flags
from experiments import evaluate as experiment
from tests.pretrained.tiny_checkpoint import checkpoint

TEXT = "hello world, naïve ☃ " * 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line with arguments; what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
        flags.FLAGS["config"].unparse()
        flags.FLAGS.unparse_flags()
        cli.run(
            experiment.of_run,
            "What it does.",
            without_config=experiment.of_checkpoint,
            own_flags=(experiment.FLAGS, model_flags.FLAGS),
        )
        return capsys.readouterr().out

    return call


def test_text_files(path, call, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    out = call(f"--checkpoint={path}", f"--text={file}", f"--text={file}", "--window=20", "--stride=5", "--batch=2")
    options = {"window": 20, "stride": 5, "batch_size": 2}
    found = evaluate_texts(load(path), load_tokenizer(path), [TEXT] * 2, **options)
    assert out.splitlines() == [
        f"2 texts, {2 * len(TEXT.encode())} bytes, {found.tokens} tokens; windows of 20 by 5",
        f"  bits per byte   {found.bits_per_byte:.4f}",
        f"  bits per token  {found.bits_per_token:.4f}",
        f"  perplexity      {found.perplexity:.4f} of tokens",
    ]


@pytest.mark.slow
def test_the_embedded_text(path, call):
    out = call(f"--checkpoint={path}", "--max_bytes=500", "--window=64", "--batch=2")
    assert ", 500 bytes, " in out
    assert "windows of 64 by 32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "flags: got neither --config nor --checkpoint; needs"),
        (("--checkpoint={path}", "--text=nowhere.txt"), "--text: got 'nowhere.txt'; needs"),
        (("--checkpoint={path}", "--text=README.md", "--window=5", "--stride=6"), "stride: got 6; needs 1 .. 5"),
        (("--checkpoint={path}", "--checkpoint={path}"), "--checkpoint: got 2 of them; needs one"),
        (("--checkpoint={path}", "--config=configs/quickstart.py"), "--checkpoint: got one beside --config; needs"),
    ],
)
def test_errors(path, call, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        call(*(argument.format(path=path) for argument in arguments))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_tasks_without_the_harness(path, call, capsys, monkeypatch):
    if importlib.util.find_spec("lm_eval"):
        monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        call(f"--checkpoint={path}", "--tasks=hellaswag")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --tasks: got ModuleNotFoundError: ")
    assert line.endswith("needs the extra `eval`: make setup EXTRAS=dev,eval")
