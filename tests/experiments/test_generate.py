"""The command line of generation, on a small checkpoint."""

import io

import jax
import pytest
from absl import flags

from effattn_jax.models import Sampling, stream
from effattn_jax.pretrained import load, load_tokenizer
from experiments import cli, model_flags
from experiments import generate as experiment
from tests.pretrained.tiny_checkpoint import checkpoint

TOKENS, ID_OF_END = 5, 262


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line with arguments; what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["generate", f"--tokens={TOKENS}", *arguments])
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


def continued(path, ids, number=0, **options):
    options = {"sampling": Sampling(0.8), "key": jax.random.fold_in(jax.random.key(0), number)} | options
    row = list(stream(load(path), ids, max_new_tokens=TOKENS, **options))
    assert ID_OF_END not in row
    return row


def test_prompts(path, call):
    tokenizer = load_tokenizer(path)
    out = call(f"--checkpoint={path}", "--prompt=hello", "--prompt=hello")
    want = [tokenizer.decode(continued(path, tokenizer.encode("hello"), number)) for number in (0, 1)]
    assert out == "".join(f"\n--- 'hello'\nhello{text}\n" for text in want)
    assert want[0] != want[1]


def test_tokens_of_a_checkpoint_without_a_tokenizer(tmp_path, call):
    path = checkpoint(tmp_path, tokenizer=False)
    assert call(f"--checkpoint={path}", "--prompt_ids=5,6") == " ".join(map(str, continued(path, [5, 6]))) + "\n"


@pytest.mark.slow
def test_a_conversation_from_the_terminal(path, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nworld\n"))
    out = call(f"--checkpoint={path}", "--chat", "--system=be brief", "--max_length=200", "--temperature=0")
    tokenizer, messages = load_tokenizer(path), [{"role": "system", "content": "be brief"}]
    want = ""
    for line in ("hello", "world"):
        messages.append({"role": "user", "content": line})
        answer = tokenizer.decode(continued(path, tokenizer.apply_chat_template(messages), temperature=0.0))
        messages.append({"role": "assistant", "content": answer})
        want += f"\n> {line}\n{answer}\n"
    assert out == want


def test_the_dtype_of_a_checkpoint(path, call, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        experiment, "talk", lambda chat, lines: seen.update(model=chat.session.model, lines=list(lines))
    )
    call(f"--checkpoint={path}", "--chat", "--prompt=hello", "--dtype=bfloat16")
    assert seen["model"].embedding.dtype == "bfloat16"
    assert seen["lines"] == ["hello"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "flags: got neither --config nor --checkpoint; needs"),
        (("--checkpoint=nowhere",), "path_or_repo: got 'nowhere'; needs"),
        (("--checkpoint={path}",), "flags: got no --prompt; needs"),
        (("--checkpoint={path}", "--prompt_ids=5,x"), "--prompt_ids: got 5,x; needs"),
        (("--checkpoint={path}", "--prompt_ids=5,999"), "prompts[0]: got tokens 5 .. 999; needs"),
        (("--checkpoint={path}", "--config=configs/quickstart.py"), "--checkpoint: got one beside --config; needs"),
        (("--checkpoint={path}", "--prompt=a", "--top_p=2"), "top_p: got 2.0; needs"),
    ],
)
def test_errors(path, call, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        call(*(argument.format(path=path) for argument in arguments))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_help_names_the_flags_of_a_checkpoint(call):
    out = call("--help")
    assert all(f"--{name}=<" in out for name in ("checkpoint", "dtype", "step"))
