"""Waves, the inputs of all tables of golden numbers: 32 tokens of 4 channels, two query heads and one key head."""

import numpy as np

LENGTH, CHANNELS, SCALE = 32, 4, 0.5
DIGITS = 6e-7  # the tables are rounded to six digits

_i, _c = np.arange(LENGTH, dtype=np.float64)[:, None], np.arange(CHANNELS, dtype=np.float64)[None, :]
KEYS = 2 * np.cos(0.5 * _i - 0.9 * _c + 0.2)
VALUES = np.sin(0.3 * _i + 0.4 * _c)


def queries(head=0):
    """[32, 4] of head 0 or 1."""
    return 2 * np.sin(0.7 * _i + 1.3 * _c + 0.1 + 0.5 * head)


def waves(*heads):
    """q [1, 32, H, 4] of the given heads (none: head 0), k and v [1, 32, 1, 4]."""
    q = np.stack([queries(head) for head in heads or (0,)], axis=1)
    return q[None], KEYS[None, :, None], VALUES[None, :, None]
