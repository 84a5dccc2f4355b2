"""The tokenizer of a published checkpoint: text to tokens and back, its special tokens, and its chat template."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer

from effattn_jax import checks
from effattn_jax.pretrained.chat_template import ChatTemplate, Message
from effattn_jax.pretrained.detokenizer import Detokenizer
from effattn_jax.pretrained.hub import WORDS, directory_of

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WORLD = "rwkv_vocab*.txt"
CONFIGS = ("generation_config.json", "config.json")  # the first that names stop tokens counts


def load_tokenizer(path_or_repo: str | os.PathLike[str]) -> "PretrainedTokenizer":
    """The tokenizer in a directory in Hugging Face's format, or of a repository of its hub; or RWKV's vocabulary there.

    Raises:
      ValueError: no tokenizer.json and no rwkv_vocab*.txt, or a damaged one; a name that the hub cannot be asked for.
    """
    directory = directory_of(path_or_repo, WORDS)
    worlds = sorted(directory.glob(WORLD))
    if worlds and not (directory / TOKENIZER).is_file():
        from effattn_jax.pretrained.world_tokenizer import WorldTokenizer  # which stands on this file

        return WorldTokenizer(worlds[-1])
    return PretrainedTokenizer(directory)


def has_tokenizer(directory: pathlib.Path) -> bool:
    return (directory / TOKENIZER).is_file() or any(directory.glob(WORLD))


class PretrainedTokenizer:
    """tokenizer.json, and what tokenizer_config.json and chat_template.jinja say beside it.

    Keeps the protocol of `effattn_jax.training.data.Tokenizer`. `special_tokens` are those of tokenizer_config.json by
    the name of their role ("eos_token"). `bos` opens a document: where there is no such token, the one that closes the
    document before does; `eos` is None where there is none. `stop_tokens` end a continuation: those of
    generation_config.json, else config.json, and `eos`. `chat_template` is None where there is none.
    """

    def __init__(self, directory: pathlib.Path):
        path = directory / TOKENIZER
        if not path.is_file():
            checks.fail("path", f"no {TOKENIZER} in {directory}", "a tokenizer in the format of the tokenizers library")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            checks.fail(TOKENIZER, str(error), "a tokenizer in the format of the tokenizers library")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = read_json(directory / SETTINGS)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens = special_tokens(settings)
        self.eos = self._id("eos_token")
        self.bos = self.eos if (bos := self._id("bos_token")) is None else bos
        self.stop_tokens = self._stop_tokens(directory)
        self._settings = settings
        self._templates = templates(directory, settings)

    def encode(self, text: bytes | str, *, special_tokens: bool = False) -> Int[np.ndarray, " n"]:
        """Tokens of a text. A special token that is spelled out in it is that token.

        Args:
          special_tokens: whether to put in front and behind what the authors' tokenizer puts there.
        """
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        first = self._id("bos_token") if special_tokens and self._settings.get("add_bos_token") else None
        if first is not None and ids[:1] != [first]:  # of older tokenizers, whose tokenizer.json does not say so
            ids = [first, *ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, without special tokens, and with U+FFFD where bytes are no text."""
        return self._tokenizer.decode([int(token) for token in ids])

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        """For tokens that come one by one behind `before`."""
        return Detokenizer(self.decode, before)

    @property
    def chat_template(self) -> str | None:
        return self._templates.get("default")

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Messages as the model has learned to read them.

        Args:
          messages: {"role": "user", "content": "..."} and so on.
          add_generation_prompt: the text ends where the assistant is to begin.
          tools: JSON schemas of functions that the model may call, where the template knows any.
          variables: others that the template reads.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        source = self._templates.get("tool_use") if tools else None
        source = self.chat_template if source is None else source
        if source is None:
            checks.fail("tokenizer", "one without a chat template", f"{TEMPLATE}, or chat_template in {SETTINGS}")
        template = ChatTemplate(source, self.special_tokens)
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Int[np.ndarray, " n"]:
        """Tokens of `chat_text`, whose template says which special tokens there are."""
        return self.encode(self.chat_text(messages, **options))

    def _id(self, role: str) -> int | None:
        name = self.special_tokens.get(role)
        return None if name is None else self._tokenizer.token_to_id(name)

    def _stop_tokens(self, directory: pathlib.Path) -> tuple[int, ...]:
        named: list[Any] = [read_json(directory / name).get("eos_token_id") for name in CONFIGS]
        given: Any = next((ids for ids in named if ids is not None), [])
        ids = [*(given if isinstance(given, list) else [given]), self.eos]
        return tuple(dict.fromkeys(token for token in ids if token is not None))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """By role: settings whose name ends in _token, spelled as text or as {"content": text}."""
    found = {}
    for role, value in settings.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if role.endswith("_token") and isinstance(text, str):
            found[role] = text
    return found


def templates(directory: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name. A file of its own counts before tokenizer_config.json, which may have one or a list of named ones."""
    given = settings.get("chat_template")
    found = {"default": given} if isinstance(given, str) else {x["name"]: x["template"] for x in given or ()}
    path = directory / TEMPLATE
    return found | ({"default": path.read_text(encoding="utf-8")} if path.is_file() else {})


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """{} where there is no such file.

    Raises:
      ValueError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        checks.fail(path.name, str(error), "JSON")
    if not isinstance(value, dict):
        checks.fail(path.name, type(value).__name__, "a JSON object")
    return value
