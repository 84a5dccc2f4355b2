"""Where the files of a checkpoint are: a directory, or a repository of the Hugging Face hub."""

import os
import pathlib
import re

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from effattn_jax import checks

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def directory_of(path_or_repo: str | os.PathLike[str]) -> pathlib.Path:
    """The directory itself, or the local copy of a repository, fetched where it is not there yet.

    Raises:
      ValueError: no such directory, and no repository that can be reached.
    """
    path = pathlib.Path(path_or_repo)
    if path.is_dir():
        return path
    name = os.fspath(path_or_repo)
    if not REPOSITORY.fullmatch(name):
        checks.fail("path_or_repo", repr(name), 'a directory that is there, or a repository "author/name"')
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(FILES)))
    except LocalEntryNotFoundError:
        checks.fail("path_or_repo", f"{name!r}, which is no directory here, and the hub cannot be reached", "either")
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        checks.fail("path_or_repo", f"{name!r}: {type(error).__name__}: {first}", "a repository of the hub")
