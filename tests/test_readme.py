"""The README's own code runs, and its shell commands name files that exist."""

import re
from pathlib import Path

from experiments.mechanism_table import inserted

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_examples_run():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["scores"].shape == (2, 300, 10)
    assert names["state"].shape == (2, 4, 64, 64)
    assert names["out"].shape == (2, 300, 4, 64)


def test_named_files_exist():
    named = re.findall(r"(?:configs|experiments)/[\w/]+\.\w+", TEXT) + re.findall(r"`([\w/]+\.md)`", TEXT)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m experiments\.(\w+)", TEXT):
        assert (ROOT / "experiments" / f"{module}.py").exists()


def test_tables_are_those_of_the_code():
    """`python -m experiments.mechanism_table --write` makes them anew."""
    assert inserted(TEXT) == TEXT
