"""Train or validation, from a file's name alone: a file stays where it is when others come and go."""

import hashlib

VALIDATION_PERCENT = 4


def split_of(name: str) -> str:
    """ "validation" for about 4 % of all names (a path relative to the source's root, with "/"), else "train"."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "validation" if fraction < VALIDATION_PERCENT / 100 else "train"
