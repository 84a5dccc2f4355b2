"""A conversation as text, by the Jinja template that its authors trained with."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from effattn_jax import checks

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and what else a template knows


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant said; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 has it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template in the dialect of Hugging Face: sandboxed Jinja, in which `raise_exception(message)`,
    `strftime_now(format)` and `tojson` (which escapes nothing) are known, as are `break` and `continue`.

    Args:
      source: the template.
      variables: what it may read beside the messages: the special tokens by name.

    Raises:
      ValueError: no Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            checks.fail("chat_template", f"{type(error).__name__}: {error}", "a Jinja template")
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text; with `add_generation_prompt` it ends where the assistant is to begin.

        Raises:
          ValueError: messages that the template refuses.
        """
        given = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(**self._variables | given | variables)
        except jinja2.TemplateError as error:
            checks.fail("messages", f"{type(error).__name__}: {error}", "what the chat template takes")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
