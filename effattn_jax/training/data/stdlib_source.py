"""The Python standard library's own source text as a TFDS dataset: real text on every machine, no download.

The dataset holds the library of the interpreter that runs. Its version is the interpreter's and its config a digest of
the text, so another interpreter, or a patched one, prepares its own. The hosts of one run need the same interpreter.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from effattn_jax.training.data.split import split_of

NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo"}
# The help topics are documentation in one generated file, 70 times the median; the others hold paths of the build.
GENERATED = ("pydoc_data", "_sysconfigdata", "config-")


def stdlib_files(root: Path) -> list[tuple[str, bytes]]:
    """(path relative to `root`, text) of the library's sources, sorted by path.

    Files that are empty or no UTF-8 are left out. Raises FileNotFoundError where the interpreter has no source files
    (bytecode only, or a zip archive).
    """
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if NO_LIBRARY.isdisjoint(relative.parts) and not relative.parts[0].startswith(GENERATED):
            text = path.read_bytes()
            if text and _is_utf8(text):
                files.append((relative.as_posix(), text))
    if not files:
        raise FileNotFoundError(
            f"python_stdlib: no .py files in {root}; needs an interpreter that ships its library as source text, "
            "or another source, such as folder:/path"
        )
    return sorted(files)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def digest(files: list[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for name, text in files:
        total.update(f"{name}\0{len(text)}\0".encode() + text)
    return total.hexdigest()[:12]


LIBRARY = Path(sysconfig.get_path("stdlib"))


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Features: "text", a source file, and "file", its path. Splits: "train", "validation" with 4 % of the files."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f"{sys.implementation.name}_{digest(stdlib_files(LIBRARY))}")]  # noqa: RUF012

    def __init__(self, *, file_format: str = "array_record", **options: Any):
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library, in the order of their paths.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "file": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, str | bytes]]]]:
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str | bytes]]]:
        files = [(name, text) for name, text in stdlib_files(LIBRARY) if split_of(name) == split]
        for index, (name, text) in enumerate(files):
            yield index, {"text": text, "file": name}
