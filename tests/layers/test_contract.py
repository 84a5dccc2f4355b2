"""One contract for every mixer: what goes in pieces, packed or padded comes out as if it went alone, in one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.catalogue import (
    BATCH,
    DIM,
    EVERY,
    RECORDS,
    agree,
    decode,
    decode_documents,
    forward,
    forward_documents,
    inputs,
    jit,
    layer,
    random,
    step,
    step_documents,
)
from tests.ratio import error_ratio

LENGTH, DECODED = 70, 6
CAPACITY = 2 * LENGTH
PREFILLS = (0, 1, 3, 4, 5, 64)  # about windows of 4 and 5, filters of 4 and 5 taps, chunks of 64
SPLITS = ((64, 5, 1), (1, 64, 5), (3, 4, 5, 5, 1, 3, 3, 1, 1, 4, 5, 5, 4, 5, 3, 5, 5, 4, 4))

DOCUMENTS = (1, 3, 5, 1, 1, 6, 4, 2, 1)
PACKED = sum(DOCUMENTS)
IDS = np.tile(np.repeat(np.int32([0, 1, 3, 4, 5, 6, 8, 9, 10]), DOCUMENTS), (BATCH, 1))

# Bfloat16 rounds inputs, weights and what lies between; each rounding is 2^-9 of its value.
BFLOAT16_LAYER = 0.015


@functools.cache
def one_pass(name):
    return np.asarray(forward(layer(name), inputs(LENGTH)))


@functools.cache
def packed_pass(name):
    return np.asarray(forward_documents(layer(name), inputs(PACKED), IDS))


def empty(name):
    return layer(name).init_state(BATCH, CAPACITY)


def in_calls(name, x, sizes, ids=None):
    state, out, start = empty(name), [], 0
    for size in sizes:
        part = slice(start, start + size)
        if ids is None:
            y, state = step(layer(name), x[:, part], state)
        else:
            y, state = step_documents(layer(name), x[:, part], state, ids[:, part])
        out.append(y)
        start += size
    assert start == x.shape[1]
    return np.concatenate(out, axis=1)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(name, dtype):
    x, module = jax.ShapeDtypeStruct((BATCH, 9, DIM), dtype), layer(name, dtype)
    y, state = jax.eval_shape(module, x)
    assert (y.shape, y.dtype, state) == (x.shape, dtype, None)
    start = jax.eval_shape(lambda: module.init_state(BATCH, 9))
    y, state = jax.eval_shape(module, x, start)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    like = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert like(state) == like(start)


@EVERY
def test_bfloat16_follows_float32(name):
    x = jnp.asarray(inputs(LENGTH), jnp.bfloat16)
    got = forward(layer(name, jnp.bfloat16), x).astype(jnp.float32)
    want = forward(layer(name), x.astype(jnp.float32))
    if RECORDS[name].chooses:  # rounding makes a close choice another one: of most tokens, not of all
        ratios = [error_ratio(*rows) for rows in zip(np.asarray(want)[0], np.asarray(got)[0], strict=True)]
        assert np.quantile(ratios, 0.8) <= BFLOAT16_LAYER
    else:
        agree(want, got, limit=BFLOAT16_LAYER)


@EVERY
@pytest.mark.parametrize("length", PREFILLS)
def test_prefill_then_decoding_is_one_pass(name, length):
    x, end = inputs(LENGTH), length + DECODED
    y, state = step(layer(name), x[:, :length], empty(name))
    agree(one_pass(name)[:, :length], y, "prefill")
    y, _ = decode(layer(name), x[:, length:end], state)
    agree(one_pass(name)[:, length:end], y, "decoding")


@EVERY
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_is_one_pass(name, sizes):
    agree(one_pass(name), in_calls(name, inputs(LENGTH), sizes))


@EVERY
def test_packed_documents_are_separate_rows(name):
    """Each document at the start of a row of its own; what follows there cannot matter, the layer being causal."""
    x, want, start = inputs(PACKED), [], 0
    for size in DOCUMENTS:
        alone = random("junk", BATCH, LENGTH, DIM)
        alone[:, :size] = x[:, start : start + size]
        want.append(np.asarray(forward(layer(name), alone))[:, :size])
        start += size
    agree(np.concatenate(want, axis=1), packed_pass(name))


@EVERY
@pytest.mark.parametrize("sizes", [(4,) * 6, (5, 5, 5, 5, 4), (4, 5, 5, 5, 5)], ids=str)
def test_packed_row_in_pieces_is_one_pass(name, sizes):
    """At boundaries of documents and inside them; documents shorter and longer than a piece."""
    agree(packed_pass(name), in_calls(name, inputs(PACKED), sizes, IDS))


@EVERY
def test_packed_row_token_by_token_is_one_pass(name):
    agree(packed_pass(name), decode_documents(layer(name), inputs(PACKED), empty(name), IDS)[0])


@jit
@functools.partial(jax.vmap, in_axes=(None, None, None, None, 0))
def split_by_padding(layer, x, state, ids, cut):
    """The row in two calls of full length: padding at the end of the first, at the start of the second."""
    cuts = jnp.stack([cut, x.shape[1] - cut])[:, None]  # the two rows of the batch are cut at different places
    before = jnp.arange(x.shape[1]) < cuts
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), before.shape)
    parts = []
    for real in (before, ~before):
        row, documents = jnp.where(real[..., None], x, 7), jnp.where(real, ids, -1)
        y, state = layer(row, state, segment_ids=documents, positions=positions)
        parts.append(y)
    return jnp.where(before[..., None], *parts)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if record.slow else [])
        for name, record in RECORDS.items()
        if "window" not in record.options
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_padding_at_either_end_leaves_the_state(name, packed):
    """Every cut, also before the first and after the last token. (In a window padding takes the place of a token.)"""
    ids = IDS if packed else np.full_like(IDS, 3)
    got = split_by_padding(layer(name), inputs(PACKED), empty(name), ids, np.arange(PACKED + 1))
    want = packed_pass(name) if packed else one_pass(name)[:, :PACKED]
    agree(np.broadcast_to(want, got.shape), got)


@EVERY
@pytest.mark.parametrize("padding", [(2, 0), (7, 1), (17, 3), (PACKED - 1, 5)], ids=str)
def test_left_padding_then_decoding(name, padding):
    """Rows of different lengths, padded at the front, with and without a state; then tokens that have no ids."""
    lengths = PACKED - np.array(padding)
    x, rows = inputs(LENGTH), random("junk", BATCH, PACKED, DIM)
    for row, n, real in zip(rows, lengths, x, strict=True):
        row[PACKED - n :] = real[:n]
    ids = np.where(np.arange(PACKED) < PACKED - lengths[:, None], -1, 0)
    follow = np.stack([row[n : n + DECODED] for row, n in zip(x, lengths, strict=True)])

    y = np.asarray(forward_documents(layer(name), rows, ids))
    prefilled, state = step_documents(layer(name), rows, empty(name), ids)
    decoded, _ = decode(layer(name), follow, state)
    for i, n in enumerate(lengths):
        want = one_pass(name)[i]
        agree(want[:n], y[i, PACKED - n :], "no state")
        agree(want[:n], np.asarray(prefilled)[i, PACKED - n :], "prefill")
        agree(want[n : n + DECODED], np.asarray(decoded)[i], "decoding")


@EVERY
def test_right_padding_changes_nothing(name):
    for n in (1, 5, PACKED - 1):
        x, ids = inputs(PACKED).copy(), np.full_like(IDS, 2)
        x[:, n:], ids[:, n:] = 1e3, -1
        agree(one_pass(name)[:, :n], np.asarray(forward_documents(layer(name), x, ids))[:, :n])


@EVERY
def test_tokens_without_ids_are_document_0(name):
    x = inputs(LENGTH)
    _, state = step(layer(name), x[:, :4], empty(name))
    ids = np.zeros((BATCH, 4), np.int32)
    agree(one_pass(name)[:, 4:8], step_documents(layer(name), x[:, 4:8], state, ids)[0], "document 0")
    other = step_documents(layer(name), x[:, 4:8], empty(name), ids)[0]
    agree(other, step_documents(layer(name), x[:, 4:8], state, ids + 1)[0], "document 1")


@jit
def input_gradient(layer, x, weights, ids):
    return jax.grad(lambda x: jnp.sum(weights * layer(x, segment_ids=ids)[0]))(x)


@EVERY
def test_no_gradient_to_the_future_or_another_document(name):
    """None at all to the future. The sums of gates reach over documents and cancel there, to rounding."""
    x, weights = inputs(PACKED), random("weights", BATCH, PACKED, DIM)
    token = np.arange(PACKED)[:, None]
    for cut in (1, 4, 15, 23):
        read = np.where(token < cut, weights, 0)
        gradient = np.asarray(input_gradient(layer(name), x, read, np.zeros_like(IDS)))
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[:, cut:]).max() == 0
        assert np.abs(gradient[:, :cut]).max(axis=-1).min() > 0
    for document in (1, 5, 8):
        inside = (document == IDS)[..., None]
        gradient = np.abs(input_gradient(layer(name), x, np.where(inside, weights, 0), IDS))
        assert np.max(gradient, where=~inside, initial=0) <= 1e-6 * np.max(gradient)
        assert np.max(gradient * (document < IDS)[..., None]) == 0
        assert np.min(np.max(gradient, axis=-1, keepdims=True), where=inside, initial=1) > 0
