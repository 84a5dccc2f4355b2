"""Where the files of a checkpoint are: a directory, or a repository of the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Callable, Sequence

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from effattn_jax import checks

WORDS = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "*vocab*")
FILES = (*WORDS, "*.safetensors")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PTH = ".pth"
FILE = re.compile(rf"({REPOSITORY.pattern})/(.+{re.escape(PTH)})")


def directory_of(path_or_repo: str | os.PathLike[str], files: Sequence[str] = FILES) -> pathlib.Path:
    """The directory itself, or the local copy of a repository, fetched where it is not there yet.

    Args:
      files: patterns of those that are needed; `WORDS` are all but the weights.

    Raises:
      ValueError: no such directory, and no repository that can be reached.
    """
    path, name = pathlib.Path(path_or_repo), os.fspath(path_or_repo)
    if path.is_dir():
        return path
    if not REPOSITORY.fullmatch(name):
        checks.fail("path_or_repo", repr(name), 'a directory that is there, or a repository "author/name"')
    return _fetched(name, "directory", lambda: snapshot_download(name, allow_patterns=list(files)))


def file_of(path_or_name: str | os.PathLike[str]) -> pathlib.Path:
    """The file itself, or the local copy of "author/name/x.pth", fetched where it is not there yet.

    Raises:
      ValueError: no such file, and no repository that can be reached.
    """
    path, name = pathlib.Path(path_or_name), os.fspath(path_or_name)
    if path.is_file():
        return path
    parts = FILE.fullmatch(name)
    if not parts:
        checks.fail("path_or_repo", repr(name), f'a file that is there, or "author/name/x{PTH}"')
    return _fetched(name, "file", lambda: hf_hub_download(parts[1], parts[2]))


def _fetched(name: str, kind: str, fetch: Callable[[], str]) -> pathlib.Path:
    try:
        return pathlib.Path(fetch())
    except LocalEntryNotFoundError:
        checks.fail("path_or_repo", f"{name!r}, which is no {kind} here, and the hub cannot be reached", "either")
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        checks.fail("path_or_repo", f"{name!r}: {type(error).__name__}: {first}", "a repository of the hub")
