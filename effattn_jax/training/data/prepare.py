"""Prepare a TFDS dataset once, however many processes ask for it at the same time."""

import contextlib
import fcntl
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds


def prepared(make_builder: Callable[[], tfds.core.DatasetBuilder], *, quiet: bool) -> tfds.core.DatasetBuilder:
    """The builder, its data on disk as array_record. `quiet` holds back the notes and bars TFDS prints on the way."""
    builder = make_builder()
    if builder.data_path.exists():  # TFDS writes elsewhere and renames, so a folder that exists is complete
        return builder
    with _lock(builder.data_dir), _silence() if quiet else contextlib.nullcontext():
        builder = make_builder()  # another process may have prepared it while this one waited
        if not builder.data_path.exists():
            from_source = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(download_config=from_source, file_format="array_record")
    return builder


@contextlib.contextmanager
def _lock(data_dir: str) -> Iterator[None]:
    """One process at a time; freed by the system when its holder dies. Remote folders ("gs://...") have no locks."""
    if "://" in data_dir:
        yield
        return
    path = Path(data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
