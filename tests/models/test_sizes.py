"""Counts against counts by hand."""

import jax
import pytest

from effattn_jax.models import sizes, training_flops_per_token
from effattn_jax.models.sizes import format_bytes
from tests.models.tiny import DIM, MLP, REPEATS, VOCAB, hybrid

INNER, HEADS, STATE, GROUPS, CONV = 16, 4, 4, 2, 4  # of mamba2: expand 2, head_dim 4
MAMBA2_MATRICES = DIM * (2 * INNER + 2 * GROUPS * STATE + HEADS) + INNER * DIM
MAMBA2_REST = (CONV + 1) * (INNER + 2 * GROUPS * STATE) + 3 * HEADS + INNER
LOCAL_MATRICES = DIM * (8 + 2 * 4) + 8 * DIM  # 2 heads of 4 on 1 of 4
GLOBAL_MATRICES = DIM * 3 * 12 + 12 * DIM  # 2 heads of 6
MLP_MATRICES = 3 * DIM * MLP
MATRICES = REPEATS * (MAMBA2_MATRICES + LOCAL_MATRICES + GLOBAL_MATRICES + 3 * MLP_MATRICES)
REST = REPEATS * (MAMBA2_REST + 2 + 2 * 6 + 3 * 2 * DIM) + DIM  # sinks, query-key norms, norms of blocks, last norm


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied):
    got = sizes(hybrid(tie_embeddings=tied), 100)
    embeddings = VOCAB * DIM * (1 if tied else 2)
    assert (got.parameters, got.embedding_parameters) == (MATRICES + REST + embeddings, embeddings)


@pytest.mark.parametrize("length", [10, 1000])
def test_state_and_cache(length):
    """Sizes per sequence, and what is really there."""
    model = hybrid()
    got = sizes(model, length)
    floats = HEADS * STATE * 4 + (CONV - 1) * (INNER + 2 * GROUPS * STATE)
    assert got.state_bytes == REPEATS * 4 * (floats + 1)  # and the document
    slot = lambda kv: 4 * (2 * kv + 1)  # noqa: E731 - key, value, document
    assert got.cache_bytes == REPEATS * (3 * slot(4) + length * slot(2 * 6) + 2 * 2 * 4)  # and length, last document
    state = model.init_state(1, length)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == got.state_bytes + got.cache_bytes
    assert got.max_length == length


@pytest.mark.parametrize("length", [1, 2, 99])
def test_training_flops(length):
    """6 per weight of a matrix and token, the head being one; and the mixing, three times its forward pass."""
    keys = (length + 1) / 2
    memory = 4 * HEADS * STATE * 4
    scores = 4 * 8 * min(3, keys) + 4 * 12 * keys
    want = 6 * (MATRICES + VOCAB * DIM) + 3 * REPEATS * (memory + scores)
    for tied in (True, False):
        assert training_flops_per_token(hybrid(tie_embeddings=tied), length) == pytest.approx(want)


def test_words():
    text = str(sizes(hybrid(), 2000))
    assert f"{MATRICES + REST + VOCAB * DIM:,} parameters ({VOCAB * DIM:,} in embeddings)" in text
    assert "2,000 tokens" in text
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536 * 1024, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5120.0 GiB",
    ]
