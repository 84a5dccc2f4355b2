"""Talking with a model in the turns of its chat template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effattn_jax.models import LanguageModel, Session
from effattn_jax.pretrained.detokenizer import pieces
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer


class Chat:
    """A conversation in messages.

        chat = Chat(model, tokenizer, max_length=8192)
        for text in chat.say("Why is the sky blue?", max_new_tokens=300, key=key):
            print(text, end="", flush=True)

    The model reads what is new of the conversation as the template writes it. Where the template writes the past in
    another way than it was read (it may drop thoughts, or an answer may have been cut short), all is read again.

    Args:
      max_length: tokens of the whole conversation at most.
      system: what the system says first; None for nothing.
      tools: see `PretrainedTokenizer.chat_text`.

    Attributes:
      messages: the conversation so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PretrainedTokenizer,
        *,
        max_length: int,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ):
        self.tokenizer, self.tools = tokenizer, tools
        self.session = Session(model, max_length=max_length)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str, **options: Any) -> Iterator[str]:
        """The answer, piece by piece; `options` are those of `Session.stream`, but for the stop tokens.

        Raises:
          ValueError: what the template or `Session.stream` refuses.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(messages, tools=self.tools).tolist()
        self.session.follow(prompt)
        tokens = self.session.stream(stop_tokens=self.tokenizer.stop_tokens, **options)
        self.messages = messages
        return self._answer(pieces(self.tokenizer.detokenizer(prompt), tokens))

    def _answer(self, parts: Iterator[str]) -> Iterator[str]:
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        for part in parts:
            answer["content"] += part
            yield part
