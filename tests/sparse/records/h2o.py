"""H2O from the first token on, so that every later one meets a full cache."""

from functools import partial

import numpy as np

from effattn_jax.sparse.h2o import h2o, h2o_prefill
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import after_a_prompt

HEAVY, RECENT = 4, 3


def weights(q, k):
    """softmax of q [R, K] over k [n, K]."""
    s = q @ k.T / np.sqrt(q.shape[1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def keep(score, newest, heavy, recent):
    """{token: score} of what stays once the token `newest` is in."""
    near = {j for j in score if j > newest - recent}
    best = sorted(set(score) - near, key=lambda j: (-score[j], j))[:heavy]
    return {j: score[j] for j in sorted([*near, *best])}


def simulate(q, k, v, prompt, heavy, recent):
    """Outputs of all tokens, and what is kept after each token from the prompt's last on: [B, G] of {token: score}."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    (batch, length, heads, _), groups = q.shape, k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    states = []
    for b, g in np.ndindex(batch, groups):
        of_group = slice(g * heads // groups, (g + 1) * heads // groups)
        score, history = {}, []
        for t in range(length):
            score[t] = 0.0
            read = sorted(score)
            p = weights(q[b, t, of_group], k[b, read, g])
            out[b, t, of_group] = p @ v[b, read, g]
            for j, weight in zip(read, p.sum(0), strict=True):
                score[j] += weight
            if t >= prompt - 1:
                score = keep(score, t, heavy, recent)
                history.append(dict(score))
        states.append(history)
    return out, states


def _run(q, k, v, heavy=HEAVY):
    prefill = lambda q, k, v, room: h2o_prefill(q, k, v, heavy=heavy, recent=RECENT)  # noqa: E731
    return after_a_prompt(prefill, partial(h2o, recent=RECENT), 1, q, k, v)


RECORDS = [
    Mechanism(
        "h2o",
        _run,
        oracle=lambda q, k, v: simulate(q, k, v, 1, HEAVY, RECENT)[0],
        dense=partial(_run, heavy=100),
        lengths=(1, 7, 8, 37),
        trainable=False,
        packed=False,
        continues=False,
        count=lambda length: min(length, HEAVY + RECENT + 1),  # with its own, before one is dropped
        slow=True,
    )
]
