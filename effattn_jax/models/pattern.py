"""A list of blocks as a few before, a repeated pattern, and a few after: what one scan can run."""

from collections.abc import Sequence
from typing import NamedTuple


class Pattern(NamedTuple):
    before: tuple[str, ...]
    pattern: tuple[str, ...]
    repeats: int
    after: tuple[str, ...]

    def place(self, block: int) -> tuple[str, tuple[int, ...]]:
        """The name below which a model keeps block i, and its index on the leading axis of the parameters there."""
        repeated = len(self.pattern) * self.repeats
        if block < len(self.before):
            return f"before.blocks.{block}", ()
        block -= len(self.before)
        if block < repeated:
            return f"units.blocks.{block % len(self.pattern)}", (block // len(self.pattern),)
        return f"after.blocks.{block - repeated}", ()


def repeated_pattern(blocks: Sequence[str]) -> Pattern:
    """The split with the fewest blocks to compile, then the fewest outside of the pattern.

        repeated_pattern(["dense", "a", "b", "a", "b", "a"]) == Pattern(("dense",), ("a", "b"), 2, ("a",))

    Raises:
      ValueError: no blocks.
    """
    blocks, count = tuple(blocks), len(blocks)
    best: tuple[tuple[int, int], Pattern] | None = None
    for first in range(count):
        for size in range(1, count - first + 1):
            repeats = 1
            while blocks[first + repeats * size : first + (repeats + 1) * size] == blocks[first : first + size]:
                repeats += 1
            end = first + repeats * size
            cost = (count - (repeats - 1) * size, count - repeats * size)
            if best is None or cost < best[0]:
                best = cost, Pattern(blocks[:first], blocks[first : first + size], repeats, blocks[end:])
    if best is None:
        raise ValueError("blocks: got none; needs at least one")
    return best[1]
