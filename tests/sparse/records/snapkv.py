"""SnapKV after a prompt of 20 tokens, of which it keeps nine."""

from functools import partial

import numpy as np

from effattn_jax.sparse.snapkv import snapkv, snapkv_prefill
from tests.sparse.mechanism import Mechanism
from tests.sparse.records.minference import highest, last_rows
from tests.sparse.token_by_token import after_a_prompt

PROMPT = 20
OPTIONS = {"window": 4, "capacity": 9, "kernel": 3, "pool": "avg"}


def kept(q, k, window, capacity, kernel, pool):
    """[B][G] of lists."""
    result = []
    (batch, _, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    for b in range(batch):
        rows = []
        for g in range(groups):
            votes = np.zeros(keys - window)
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                for weights in last_rows(q[b, :, h], k[b, :, g], window).values():
                    votes += weights[: keys - window]
            near = [votes[max(0, j - kernel // 2) : j + kernel // 2 + 1] for j in range(len(votes))]
            score = [x.sum() / kernel if pool == "avg" else x.max() for x in near]
            rows.append(sorted(highest(score, capacity - window)) + list(range(keys - window, keys)))
        result.append(rows)
    return result


def _mask(q, k):
    (batch, length, heads, _), groups = q.shape, k.shape[2]
    mask = np.broadcast_to(np.tri(length, dtype=bool), (batch, heads, length, length)).copy()
    if length > PROMPT:
        lists = kept(q[:, :PROMPT], k[:, :PROMPT], **OPTIONS)
        for b, h, j in np.ndindex(batch, heads, PROMPT):
            mask[b, h, PROMPT:, j] = j in lists[b][h * groups // heads]
    return mask


def _run(q, k, v, **options):
    prefill = lambda q, k, v, room: snapkv_prefill(q, k, v, room=room, **OPTIONS | options)  # noqa: E731
    return after_a_prompt(prefill, snapkv, PROMPT, q, k, v)


RECORDS = [
    Mechanism(
        "snapkv",
        _run,
        _mask,
        dense=partial(_run, capacity=PROMPT),
        lengths=(4, 20, 21, 37),
        trainable=False,
        packed=False,
        continues=False,
        count=lambda length: length if length <= PROMPT else length - PROMPT + OPTIONS["capacity"],
        slow=True,
    )
]
