"""A conversation: read and written in turns, from a state that goes on."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.models.attachment import reads_prompts_at_once
from effattn_jax.models.decoding import Rows, read
from effattn_jax.models.generation import DEFAULT_SAMPLING, PREFILL_CHUNK, Request, as_tokens, blocks, check_chunk
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sampling import Sampling
from effattn_jax.models.streaming import BLOCK, check_block, until_stop
from effattn_jax.typing import Array, Float, Int


class Session:
    """One row of tokens that grows: nothing in it is read twice.

        session = Session(model, max_length=4096)
        session.append(question)
        answer = session.generate(max_new_tokens=200, stop_tokens=[eos])
        session.append(next_question)

    `generate` and `stream` continue as `effattn_jax.models.generate` does from all `tokens` at once, to rounding.

    Args:
      max_length: tokens in all for which caches have room.
      prefill_chunk: so many tokens are read at a time, and the rest in powers of two: few programs are compiled.
    """

    def __init__(self, model: LanguageModel, *, max_length: int, prefill_chunk: int = PREFILL_CHUNK):
        if max_length < 1:
            checks.fail("max_length", max_length, "at least 1")
        check_chunk(prefill_chunk)
        self.model, self.max_length, self.prefill_chunk = model, max_length, prefill_chunk
        self.reset()

    def reset(self) -> None:
        """Back to no tokens."""
        self._tokens: list[int] = []
        self._state: Any = self.model.init_state(1, self.max_length)
        self._scores: Float[Array, "1 vocab"] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that was read and drawn, stop tokens among them."""
        return tuple(self._tokens)

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Reads tokens.

        Raises:
          ValueError: none, or outside the vocabulary; more than there is room for.
        """
        row = as_tokens("tokens", tokens, self.model.vocab_size)
        self._check_room("tokens", len(row))
        whole = not self._tokens and reads_prompts_at_once(block for _, block in self.model.parts())
        lengths = [len(row)] if whole else pieces(len(row), self.prefill_chunk)
        for part in np.split(row, np.cumsum(lengths)[:-1]):
            self._scores, self._state = read(self.model, part[None], self._state, None, len(self._tokens))
            self._tokens += part.tolist()

    def follow(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Makes these all the tokens there are: appends what is new, or where they begin differently starts anew."""
        row = as_tokens("tokens", tokens, self.model.vocab_size).tolist()
        if row[: len(self._tokens)] != self._tokens:
            self.reset()
        if len(row) > len(self._tokens):
            self.append(row[len(self._tokens) :])

    def generate(
        self,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        stop_tokens: Sequence[int] = (),
        key: Array | None = None,
    ) -> Int[np.ndarray, " n"]:
        """What the model says, up to the stop token, which is in `tokens` too. Arguments as of `generate`."""
        said = self.stream(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sampling=sampling,
            stop_tokens=stop_tokens,
            key=key,
            block=max_new_tokens,
        )
        return np.asarray(list(said), np.int32)

    def stream(
        self,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        stop_tokens: Sequence[int] = (),
        key: Array | None = None,
        block: int = BLOCK,
    ) -> Iterator[int]:
        """The same, token by token. Who stops listening early leaves a session whose `tokens` end with a whole block.

        Raises:
          ValueError: as `generate`; nothing has been read yet; no room for so many tokens.
        """
        request = Request.of(self.model, max_new_tokens, temperature, sampling, stop_tokens, key)
        check_block(block)
        if self._scores is None:
            checks.fail("session", "no tokens", "a prompt, see append")
        self._check_room("max_new_tokens", max_new_tokens)
        return until_stop(self._blocks(request, block), stop_tokens)

    def _blocks(self, request: Request, size: int) -> Iterator[np.ndarray]:
        assert self._scores is not None
        position = jnp.asarray([len(self._tokens)], jnp.int32)
        rows = Rows(self._scores, position, request.key, jnp.zeros(1, bool))
        for tokens, after, state in blocks(self.model, rows, self._state, request, size):
            self._scores, self._state = after.scores, state
            self._tokens += tokens[0].tolist()
            yield tokens[0]

    def _check_room(self, argument: str, count: int) -> None:
        room = self.max_length - len(self._tokens)
        if count > room:
            checks.fail(argument, f"{count} tokens", f"at most {room}, what is left of max_length {self.max_length}")


def pieces(length: int, chunk: int) -> list[int]:
    """Chunks, and the rest as a sum of powers of two, the largest first."""
    rest = length % chunk
    return [chunk] * (length // chunk) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
