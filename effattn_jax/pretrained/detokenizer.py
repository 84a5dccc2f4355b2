"""Text from tokens that come one by one."""

from collections.abc import Callable, Iterable, Iterator, Sequence

CONTEXT = 8  # tokens of what came before: they may shape the text of the first, its space above all
BYTES = 4  # of a character, at most
UNFINISHED = "\ufffd"


class Detokenizer:
    """Gives text as soon as it is certain: bytes of a character that is not complete yet wait for the rest.

    A piece is what `decode` says of its tokens behind those of the piece before, less what it says of the latter.

    Args:
      decode: from tokens to text.
      before: tokens in front of the first, whose text is known already.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()):
        self._decode, length = decode, CONTEXT
        while length < len(before) and decode(before[-length:]).startswith(UNFINISHED):  # inside of a character
            length *= 2
        self._tokens = list(before[-length:])  # the text of the first `_known` is out
        self._known = next((n for n in self._ends() if not self._text(n).endswith(UNFINISHED)), len(self._tokens))

    def add(self, token: int) -> str:
        """The text that is certain now, maybe none."""
        self._tokens.append(token)
        text = self._pending()
        return "" if text.endswith(UNFINISHED) else self._say(text)

    def finish(self) -> str:
        """What is left, with U+FFFD where bytes are no text."""
        return self._say(self._pending())

    def _ends(self) -> range:
        """Where the last whole character may end: all but so many of its bytes are tokens of their own."""
        return range(len(self._tokens), max(len(self._tokens) - BYTES, -1), -1)

    def _text(self, count: int) -> str:
        return self._decode(self._tokens[:count])

    def _pending(self) -> str:
        return self._text(len(self._tokens))[len(self._text(self._known)) :]

    def _say(self, text: str) -> str:
        if text:
            self._tokens = self._tokens[self._known :]
            self._known = len(self._tokens)
        return text


def pieces(detokenizer: Detokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of all tokens in pieces, none empty."""
    for token in tokens:
        if text := detokenizer.add(token):
            yield text
    if text := detokenizer.finish():
        yield text
