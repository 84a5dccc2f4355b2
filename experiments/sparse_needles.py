"""Rows of text with needles, lines of a key and a value somewhere in it, and questions for their values.

...text...
# Qx
...text...
# Qx    <- the question is "# Q", the answer "x"
"""

from typing import NamedTuple

import numpy as np

from effattn_jax import checks
from effattn_jax.training.data import ByteTokenizer, Documents
from effattn_jax.typing import Bool, Float, Int

KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
LINE = np.frombuffer(b"# Qx\n", np.uint8)
KEY, VALUE = 2, 3  # their places in a line
QUESTION = VALUE  # bytes of a line before its value


class Task(NamedTuple):
    """Rows of `length` bytes with so many needles and questions. The last question ends the row, without its newline;
    the others are among the needles, each after its own."""

    length: int
    needles: int
    questions: int = 1


class Rows(NamedTuple):
    """Text, and which of its bytes are of the task."""

    bytes: Int[np.ndarray, "R T"]  # int32
    random: Bool[np.ndarray, "R T"]  # keys, and the values of needles: nothing foretells them
    answer: Bool[np.ndarray, "R T"]
    depth: Float[np.ndarray, " R"]  # of the needle that the last question asks for: 0 begins the row


def text_of(source: Documents) -> Int[np.ndarray, " n"]:
    """All documents, one after the other."""
    return np.concatenate([ByteTokenizer().encode(source[i]) for i in range(len(source))])


def draw_rows(random: np.random.Generator, text: np.ndarray, rows: int, task: Task) -> Rows:
    """Rows from anywhere in the text; their lines are at line breaks or, where there are too few, between any bytes."""
    return Rows(*map(np.stack, zip(*(_row(random, text, task) for _ in range(rows)), strict=True)))


def _row(random: np.random.Generator, text: np.ndarray, task: Task) -> tuple[np.ndarray, ...]:
    lines = task.needles + task.questions
    room = task.length + 1 - lines * len(LINE)
    if not 1 <= task.needles <= len(KEYS) or task.questions < 1 or room < lines:
        checks.fail("task", task, f"1 to {len(KEYS)} needles, a question, and text between the lines")
    start = random.integers(len(text) - room)
    piece = text[start : start + room]
    breaks = np.flatnonzero(piece[:-1] == LINE[-1]) + 1
    breaks = breaks if len(breaks) >= lines - 1 else np.arange(room)
    places = np.append(np.sort(random.choice(breaks, lines - 1, replace=False)), room)

    asked = random.integers(task.needles, size=task.questions)
    order = random.permutation(np.append(np.arange(task.needles), asked[:-1]))
    needle = np.append(order, asked[-1])  # of every line
    first = np.zeros(lines, bool)
    first[np.unique(needle, return_index=True)[1]] = True
    written = np.tile(LINE, (lines, 1))
    written[:, KEY] = random.permutation(KEYS)[needle]
    written[:, VALUE] = random.choice(VALUES, task.needles)[needle]

    # every line is written before the byte of the text at its place
    begins = places + np.arange(lines) * len(LINE)
    within = begins[:, None] + np.arange(len(LINE))
    row = np.zeros(task.length + 1, np.int32)
    is_text = np.ones(len(row), bool)
    is_text[within] = False
    row[within], row[is_text] = written, piece
    unknown, answer = np.zeros(len(row), bool), np.zeros(len(row), bool)
    unknown[within[:, KEY]] = True
    unknown[within[:, VALUE]], answer[within[:, VALUE]] = first, ~first
    depth = begins[np.flatnonzero(first & (needle == needle[-1]))[0]] / task.length
    return row[:-1], unknown[:-1], answer[:-1], depth
