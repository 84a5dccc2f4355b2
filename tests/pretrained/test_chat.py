"""Turns of a conversation, against one call over the whole of it."""

import pytest

from effattn_jax.models import cut, generate
from effattn_jax.pretrained import load, load_tokenizer
from effattn_jax.pretrained.chat import Chat
from tests.pretrained.tiny_checkpoint import checkpoint

TOKENS = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


class Told:
    """In place of a session: what it is told to say, and what it had to read."""

    def __init__(self, *answers):
        self.answers, self.prompts = list(answers), []

    def follow(self, tokens):
        self.prompts.append(list(tokens))

    def stream(self, *, stop_tokens, max_new_tokens):
        self.stop_tokens, self.max_new_tokens = stop_tokens, max_new_tokens
        return iter(self.answers.pop(0))


def test_what_the_model_reads_and_what_is_kept(path):
    tokenizer = load_tokenizer(path)
    chat = Chat(load(path), tokenizer, max_length=10, system="be brief")
    chat.session = Told(tokenizer.encode("hello ☃").tolist(), tokenizer.encode("world").tolist())
    assert "".join(chat.say("hi", max_new_tokens=TOKENS)) == "hello ☃"
    assert chat.session.stop_tokens == tokenizer.stop_tokens
    assert chat.session.max_new_tokens == TOKENS
    assert "".join(chat.say("and?", max_new_tokens=TOKENS)) == "world"
    said = [("system", "be brief"), ("user", "hi"), ("assistant", "hello ☃"), ("user", "and?"), ("assistant", "world")]
    assert [(m["role"], m["content"]) for m in chat.messages] == said
    first, second = chat.session.prompts
    assert first == tokenizer.apply_chat_template(chat.messages[:2]).tolist()
    assert second == tokenizer.apply_chat_template(chat.messages[:4]).tolist()
    assert second[: len(first)] == first  # so that a session reads only the rest


@pytest.mark.slow
def test_answers_are_those_of_one_call(path):
    model, tokenizer = load(path), load_tokenizer(path)
    chat = Chat(model, tokenizer, max_length=200)
    for text in ("hello", "☃ and world"):
        answer = "".join(chat.say(text, max_new_tokens=TOKENS, temperature=0.0))
        prompt = tokenizer.apply_chat_template(chat.messages[:-1])
        row = generate(model, [prompt], max_new_tokens=TOKENS, temperature=0.0)[0]
        assert answer == tokenizer.decode(cut(row, tokenizer.stop_tokens))
        assert chat.messages[-1] == {"role": "assistant", "content": answer}


def test_what_is_refused_leaves_the_conversation(path):
    chat = Chat(load(path), load_tokenizer(path), max_length=60)
    with pytest.raises(ValueError, match=r"tokens: got \d+ tokens; needs at most 60"):
        chat.say("much " * 40, max_new_tokens=TOKENS, temperature=0.0)
    assert chat.messages == []
