"""Documents by name: the standard library, a folder of text files, or any TFDS text dataset."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from effattn_jax.checks import fail
from effattn_jax.training.data.split import split_of

FOLDER = "folder:"
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # what datasets call the split for validation, best first


class Documents(Protocol):
    """A random-access sequence of documents. Where it has a `fingerprint`, that changes with the data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


def open_source(
    name: str, split: str, data_dir: str | None = None, *, text_key: str | None = None, suffix: str | None = None
) -> Documents:
    """Open the documents of `split`.

    Args:
      name: "python_stdlib", "folder:/path" (the text files below), or a name of TFDS ("lm1b", "wiki40b/en").
      split: "train", "validation", or "all" files of a folder; for a TFDS dataset also an expression ("train[:1%]").
        Where a TFDS dataset has no "validation", its valid, val, dev or test split takes that place.
      data_dir: where TFDS keeps prepared datasets; None is its own default.
      text_key: the feature of a TFDS dataset that holds the text; None is "text".
      suffix: only files of a folder whose name ends so; None is every file without a NUL byte at its start.

    Raises:
      ValueError: a name, split or feature that does not exist.
      FileNotFoundError: a folder without text, or a dataset that is not prepared and cannot be.
    """
    if name.startswith(FOLDER):
        return FolderDocuments(Path(name.removeprefix(FOLDER)).expanduser(), split, suffix)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    return TfdsDocuments(name, split, data_dir, text_key or "text")


class FolderDocuments:
    """The text files below a folder, sorted by path, read when asked for. Hidden and empty files are left out."""

    def __init__(self, root: Path, split: str, suffix: str | None):
        if split not in ("train", "validation", "all"):
            fail("split", repr(split), "train, validation or all, for a folder")
        if not root.is_dir():
            raise FileNotFoundError(f"{FOLDER}{root}: no such folder")
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        names = sorted(name for name, path in files.items() if _is_text(name, path, suffix))
        if not names:
            wanted = "text" if suffix is None else f"*{suffix}"
            raise FileNotFoundError(f"{FOLDER}{root}: no {wanted} files below; needs one at least that is not empty")
        chosen = [name for name in names if split in ("all", split_of(name))]
        if not chosen:
            fail("split", f"{split!r}, where none of {len(names)} files below {root} falls", "more files, or split all")
        self.paths = [files[name] for name in chosen]
        sizes = [path.stat().st_size for path in self.paths]
        self.fingerprint = hashlib.sha256(repr(list(zip(chosen, sizes, strict=True))).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> bytes:
        return self.paths[index].read_bytes()


def _is_text(name: str, path: Path, suffix: str | None) -> bool:
    if any(part.startswith(".") for part in name.split("/")) or not path.stat().st_size:
        return False
    if suffix is not None:
        return name.endswith(suffix)
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


class TfdsDocuments:
    """The text feature of a split of a TFDS dataset; prepares the dataset where it is not on disk."""

    def __init__(self, name: str, split: str, data_dir: str | None, text_key: str):
        builder = _builder(name, data_dir)
        if text_key not in builder.info.features:
            fail("text_key", repr(text_key), f"a feature of {name}: {', '.join(builder.info.features)}")
        splits = list(builder.info.splits)
        if split == "validation":
            split = next((held_out for held_out in HELD_OUT if held_out in splits), split)
        try:
            self.examples: Sequence[dict[str, Any]] = builder.as_data_source(split)
        except NotImplementedError as error:
            _unavailable(name, "is prepared in a format without random access", error)
        except (ValueError, KeyError, AssertionError):
            fail("split", repr(split), f"one of {', '.join(splits)} of {name}, or an expression such as train[:1%]")
        self.text_key = text_key
        self.fingerprint = f"{builder.info.full_name}:{split}"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> bytes:
        return self.examples[index][self.text_key]


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds  # slow to import

    from effattn_jax.training.data.prepare import prepared

    if name == "python_stdlib":
        from effattn_jax.training.data.stdlib_source import PythonStdlib

        return prepared(lambda: PythonStdlib(data_dir=data_dir), quiet=True)
    try:
        return prepared(lambda: tfds.builder(name, data_dir=data_dir), quiet=False)
    except tfds.core.DatasetNotFoundError:
        fail("source", repr(name), "python_stdlib, folder:/path, or the name of a TFDS dataset")
    except Exception as error:  # a download, a checksum, a missing library: TFDS raises what the dataset's code raises
        _unavailable(name, f"is not prepared in {data_dir or 'the default data_dir'} and cannot be", error)


def _unavailable(name: str, problem: str, error: Exception) -> NoReturn:
    reason = (str(error).splitlines() or [""])[0]
    raise FileNotFoundError(
        f"{name}: {problem} ({type(error).__name__}: {reason}); prepare it with `tfds build {name} "
        "--file_format=array_record` on a machine with network access, and pass that data_dir"
    ) from error
