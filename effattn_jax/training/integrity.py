"""Checksums of a checkpoint: written before it is committed, compared before it is read.

Storage returns the wrong bytes in more ways than it reports: a flipped bit in an array shard decodes to wrong numbers
without an error. So each step directory carries `checksums.json`, a map from file to [bytes, CRC-32], over the files of
its items. It is the last file written before the commit, hence a step directory without it is unfinished.
"""

import json
import zlib

from etils import epath

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22


class CorruptError(RuntimeError):
    """A checkpoint whose files are not the ones that were written."""


def _checksum(path: epath.Path) -> list[int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _files(directory: epath.Path) -> list[epath.Path]:
    found: list[epath.Path] = []
    for path in sorted(directory.iterdir()):
        found += _files(path) if path.is_dir() else [path]
    return found


def write_checksums(step_directory: epath.Path) -> None:
    """Records every file of the items (the subdirectories) of a step that is fully written."""
    items = [path for path in sorted(step_directory.iterdir()) if path.is_dir()]
    files = [file for item in items for file in _files(item)]
    table = {str(file.relative_to(step_directory)): _checksum(file) for file in files}
    (step_directory / CHECKSUMS).write_text(json.dumps(table, indent=0))


def verify_checksums(step_directory: epath.Path, share: int = 0, shares: int = 1, item: str | None = None) -> None:
    """Raises CorruptError at the first file that is missing, truncated or altered.

    Reads files `share`, `share + shares`, ... of the table, so that several processes divide the work; of one item
    only, if `item` is given.
    """
    try:
        table: dict[str, list[int]] = json.loads((step_directory / CHECKSUMS).read_text())
    except FileNotFoundError:
        raise CorruptError("it is incomplete") from None
    except ValueError:
        raise CorruptError(f"{CHECKSUMS} is damaged") from None
    names = sorted(name for name in table if item is None or name.startswith(f"{item}/"))
    for name in names[share::shares]:
        path, (size, crc) = step_directory / name, table[name]
        if not path.exists():
            raise CorruptError(f"{name} is missing")
        got = path.stat().length
        if got != size:
            raise CorruptError(f"{name} has {got} of {size} bytes")
        if _checksum(path)[1] != crc:
            raise CorruptError(f"{name} does not match its checksum")
