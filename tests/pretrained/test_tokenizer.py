"""Tokens of published tokenizers, their special ones, and conversations."""

import re

import numpy as np
import pytest

from effattn_jax.pretrained import load_tokenizer
from effattn_jax.pretrained.chat_template import ChatTemplate
from effattn_jax.training.data import Tokenizer
from tests.pretrained.tiny_tokenizer import SPECIAL, by_bytes, by_pieces, write

ID = {name: 256 + 5 + i for i, name in enumerate(SPECIAL)}
TEXTS = ["hello world", "  zwei  Leerzeichen\n\n", "naïve ☃ 𝄞 日本語", "", "def f(x):\n    return x\n"]


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write(tmp_path))


def test_text_comes_back(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert (tokenizer.encode(text.encode()) == ids).all()


def test_it_is_a_tokenizer_of_the_training_data(tokenizer):
    same: Tokenizer = tokenizer
    assert (same.vocab_size, same.bos, same.eos) == (266, ID["<|bos|>"], ID["<|end|>"])
    assert same.decode([same.bos, *same.encode("hello"), same.eos]) == "hello"


def test_special_tokens_in_a_text_are_tokens(tokenizer):
    ids = tokenizer.encode("<|user|>he<|end|>")
    assert ids.tolist() == [ID["<|user|>"], 256, ID["<|end|>"]]


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, ["<|end|>"]),
        ({"config": {"eos_token_id": 5}}, [5, "<|end|>"]),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [7, ID["<|end|>"]]}}, [7, "<|end|>"]),
        ({"config": {"eos_token_id": [5, 6]}, "generation_config": {"temperature": 1.0}}, [5, 6, "<|end|>"]),
    ],
)
def test_stop_tokens(tmp_path, files, stops):
    assert load_tokenizer(write(tmp_path, **files)).stop_tokens == tuple(ID.get(stop, stop) for stop in stops)


def test_without_special_tokens(tmp_path):
    plain = load_tokenizer(write(tmp_path, tokenizer_config={}))
    assert (plain.bos, plain.eos, plain.stop_tokens, plain.chat_template) == (None, None, (), None)
    only_end = load_tokenizer(write(tmp_path, tokenizer_config={"bos_token": None, "eos_token": "<|end|>"}))
    assert (only_end.bos, only_end.eos) == (ID["<|end|>"], ID["<|end|>"])


def test_what_the_authors_put_in_front(tmp_path):
    pieces = load_tokenizer(write(tmp_path, by_pieces(), tokenizer_config={"bos_token": "<s>", "add_bos_token": True}))
    bare = pieces.encode("he").tolist()
    assert pieces.encode("he", special_tokens=True).tolist() == [1, *bare]
    settings = {"bos_token": "<|bos|>", "add_bos_token": True}  # where tokenizer.json puts none
    older = load_tokenizer(write(tmp_path, tokenizer_config=settings))
    assert older.encode("he", special_tokens=True).tolist() == [ID["<|bos|>"], 256]
    assert older.encode("he").tolist() == [256]


TALK = [
    {"role": "system", "content": "be <b>brief</b>"},
    {"role": "user", "content": "hello"},
]
SAID = "<|bos|><|system|>be <b>brief</b><|end|>\n<|user|>hello<|end|>\n"


def test_a_conversation(tokenizer):
    assert tokenizer.chat_text(TALK) == SAID + "<|assistant|>"
    assert tokenizer.chat_text(TALK, add_generation_prompt=False) == SAID
    ids = tokenizer.apply_chat_template(TALK).tolist()
    assert ids == tokenizer.encode(SAID + "<|assistant|>").tolist()
    assert [token for token in ids if token >= ID["<|bos|>"]] == [
        ID[name] for name in ("<|bos|>", "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>")
    ]


def test_tools_are_json_that_escapes_nothing(tokenizer):
    tools = [{"name": "größe", "about": "a < b"}]
    said = tokenizer.chat_text(TALK, tools=tools, add_generation_prompt=False)
    assert said == SAID + 'tools: [{"name": "größe", "about": "a < b"}]'


def test_which_template(tmp_path):
    """A file of its own before the one in the settings; of several that for tools, or the default."""
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools | length }}"}]
    named = load_tokenizer(write(tmp_path, tokenizer_config={"chat_template": several}))
    assert (named.chat_text(TALK), named.chat_text(TALK, tools=[{}, {}])) == ("plain", "with 2")
    own = load_tokenizer(write(tmp_path, chat_template="of the file"))
    assert own.chat_text(TALK) == "of the file"


def test_what_templates_use():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m.content }}{% endgeneration %}{{ mood }}{{ strftime_now('%%') }}\n"
        "{% endfor %}{{ {'b': 1, 'a': '<'} | tojson(indent=1) }}"
    )
    text = ChatTemplate(source, {"mood": "!"}).render(TALK[1:] + TALK)
    assert text == 'hello!%\n{\n "b": 1,\n "a": "<"\n}'
    assert ChatTemplate("{{ mood }}", {"mood": "!"}).render([], mood="?") == "?"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('alternate, please') }}", "messages: got TemplateError: alternate, please; needs"),
        ("{{ messages.__class__.__mro__ }}", "messages: got SecurityError"),
        ("{{ messages.append(1) }}", "messages: got SecurityError"),
        ("{{ messages[0].nothing.at_all }}", "messages: got UndefinedError"),
        ("{% if %}", "chat_template: got TemplateSyntaxError"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ChatTemplate(source, {}).render(TALK)


def test_a_role_the_template_does_not_know(tokenizer):
    with pytest.raises(ValueError, match="messages: got TemplateError: no role wizard"):
        tokenizer.chat_text([{"role": "wizard", "content": "hello"}])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"path: got no tokenizer\.json in"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: got one without a chat template"):
        load_tokenizer(write(tmp_path, tokenizer_config={})).chat_text(TALK)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: got list; needs a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: got "):
        load_tokenizer(tmp_path)


def test_an_added_token_beyond_the_vocabulary_counts(tmp_path):
    tokenizer = by_bytes()
    tokenizer.add_tokens(["zusammen"])
    assert load_tokenizer(write(tmp_path, tokenizer)).vocab_size == 267
