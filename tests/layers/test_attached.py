"""Attached mechanisms: everything is dense attention, less is what the functions of `effattn_jax.sparse` give."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention
from effattn_jax.layers.attached import AttachedAttention
from effattn_jax.sparse import (
    Clustering,
    attention,
    cached_cluster_kv,
    cached_retro,
    double_sparsity,
    flexprefill,
    h2o,
    h2o_prefill,
    init_cluster_cache,
    init_paged_cache,
    minference,
    prefill_clusters,
    quest,
    snapkv,
    snapkv_prefill,
    spargeattn,
    streaming_attention,
    xattention,
)
from effattn_jax.sparse.decoders import DECODERS
from effattn_jax.sparse.double_sparsity import append_labels, init_labels
from effattn_jax.sparse.minference import AShape, VerticalSlash
from effattn_jax.sparse.prefills import PREFILLS
from effattn_jax.sparse.quest import append_quest, init_quest
from tests.layers.catalogue import agree, filled, jit, random

DIM, HEADS, BATCH, PROMPT, LENGTH = 32, 4, 2, 24, 30
OPTIONS = {"heads": HEADS, "kv_heads": 2, "qk_norm": True, "gate": True, "scale": 0.6, "rope_fraction": 0.5}
X = random("attached", BATCH, LENGTH, DIM)
CLUSTERING = Clustering(sink=2, clusters=4, window=4, window_clusters=2)

ALL_OF_A_PROMPT = {
    "minference": {"pattern": VerticalSlash(LENGTH, LENGTH), "block_size": 8},
    "flexprefill": {"gamma": 1.1, "tau": 0.0, "block_size": 8, "min_budget": 8},
    "xattention": {"tau": 1.1, "block_size": 8, "stride": 4},
    "spargeattn": {"topk": 1.0, "block_size": 4, "query_block": 8},
    "streaming": {"start": 1, "recent": LENGTH},
}
FEW_OF_A_PROMPT = {
    "minference": {"pattern": [AShape(1, 2), AShape(2, 5)] * 2, "block_size": 4},
    "flexprefill": {"gamma": 0.3, "block_size": 4, "min_budget": 4, "max_budget": 8},
    "xattention": {"tau": np.float32([0.2, 0.3, 0.4, 0.5]), "block_size": 4, "stride": 2},
    "spargeattn": {"topk": 0.2, "block_size": 2, "query_block": 4},
    "streaming": {"start": 2, "recent": 3},
}
ALL_THAT_IS_KEPT = {
    None: {},
    "quest": {"budget": 32, "page_size": 4},
    "double_sparsity": {"heavy": LENGTH, "page_size": 4},
    "h2o": {"heavy": LENGTH, "recent": 4},
    "snapkv": {"window": 4, "capacity": LENGTH},
    "cluster_kv": {"budget": LENGTH, "clustering": CLUSTERING},
    "retro": {"retrieval": 1.0, "estimation": 0.0, "clustering": CLUSTERING},
    "streaming": {"start": 1, "recent": LENGTH},
}
FEW_THAT_ARE_KEPT = {
    "quest": {"budget": 8, "page_size": 4},
    "double_sparsity": {"heavy": 5, "channels": 3, "page_size": 4},
    "h2o": {"heavy": 4, "recent": 3},
    "snapkv": {"window": 4, "capacity": 8, "kernel": 3},
    "cluster_kv": {"budget": 6, "clustering": CLUSTERING},
    "retro": {"retrieval": 0.2, "estimation": 0.3, "clustering": CLUSTERING},
    "streaming": {"start": 2, "recent": 3},
}


@functools.cache
def dense():
    return filled(lambda: Attention(DIM, **OPTIONS, rngs=nnx.Rngs(0)))


@jit
def projected(layer, x):
    """q, k, v, and q and k before their rotation."""
    position = jnp.arange(x.shape[1])[None]
    q, k = layer.queries(x), layer.keys(x)
    return layer.rotated(q, position), layer.rotated(k, position), layer.values(x), q, k


def of_heads(out, x):
    """The layer's output, of the heads': gated and projected."""
    p = {name: np.asarray(getattr(dense(), name).kernel[...]) for name in ("gate_proj", "out_proj")}
    return (np.asarray(out).reshape(*x.shape[:2], -1) / (1 + np.exp(-x @ p["gate_proj"]))) @ p["out_proj"]


@jit
def prefilled_and_decoded(layer, x):
    """A prompt, then the rest, and the tokens that the state has seen."""
    prompt, state = layer(x[:, :PROMPT], layer.init_state(BATCH, LENGTH))
    y, state = layer(x[:, PROMPT:], state)
    return jnp.concatenate([prompt, y], axis=1), state.length


@jit
def forward(layer, x):
    return layer(x)[0]


@pytest.mark.parametrize("name", ALL_OF_A_PROMPT)
@pytest.mark.quick_cases(1)
def test_all_of_a_prompt_is_dense_attention(name):
    layer = AttachedAttention(dense(), prefill=name, prefill_options=ALL_OF_A_PROMPT[name])
    agree(forward(dense(), X), forward(layer, X))


@pytest.mark.parametrize("name", FEW_OF_A_PROMPT)
@pytest.mark.quick_cases(1)
def test_a_prompt_is_read_as_the_function_reads_it(name):
    options = FEW_OF_A_PROMPT[name]
    layer = AttachedAttention(dense(), prefill=name, prefill_options=options)
    q, k, v, unrotated_q, unrotated_k = projected(dense(), X)
    function = {
        "minference": minference,
        "flexprefill": flexprefill,
        "xattention": xattention,
        "spargeattn": spargeattn,
        "streaming": lambda q, k, v, **options: streaming_attention(
            unrotated_q, unrotated_k, v, rotate=dense().rotated, **options
        ),
    }[name]
    got = np.asarray(forward(layer, X))
    agree(of_heads(jit(lambda: function(q, k, v, scale=0.6, **options))(), X), got)
    everything = np.asarray(forward(dense(), X))
    assert np.abs(got - everything).max() > 0.01 * np.abs(everything).max()


def test_prefill_of_ones_own():
    def before_it(q, k, v, *, scale, most):
        assert (q.shape, k.shape, v.shape) == ((BATCH, LENGTH, HEADS, 8), (BATCH, LENGTH, 2, 8), (BATCH, LENGTH, 2, 8))
        return attention(q, k, v, scale=scale, window=most)

    layer = AttachedAttention(dense(), prefill=before_it, prefill_options={"most": 3})
    window = nnx.merge(*nnx.split(dense()))
    window.window = 3
    agree(forward(window, X), forward(layer, X))


@pytest.mark.parametrize("name", ALL_THAT_IS_KEPT)
@pytest.mark.quick_cases(1)
def test_all_that_is_kept_is_dense_attention(name):
    layer = AttachedAttention(dense(), decode=name, decode_options=ALL_THAT_IS_KEPT[name])
    y, length = prefilled_and_decoded(layer, X)
    agree(forward(dense(), X), y)
    assert length == LENGTH


@pytest.mark.slow
def test_any_split_behind_the_prompt():
    layer = AttachedAttention(dense(), decode="h2o", decode_options=FEW_THAT_ARE_KEPT["h2o"])
    want = prefilled_and_decoded(layer, X)[0][:, PROMPT:]
    step = jit(lambda layer, x, state: layer(x, state))
    state, parts = step(layer, X[:, :PROMPT], layer.init_state(BATCH, LENGTH))[1], []
    for first, last in ((24, 25), (25, 29), (29, 30)):
        y, state = step(layer, X[:, first:last], state)
        parts.append(y)
    agree(want, np.concatenate(parts, axis=1))


def by_steps(begin, step):
    """What a mechanism gives for each token behind the prompt."""
    begin, step = jit(begin), jit(step)

    def directly(q, k, v, *_):
        cache = begin(*(x[:, :PROMPT] for x in (q, k, v)))
        for i in range(PROMPT, LENGTH):
            out, cache = step(*(x[:, i : i + 1] for x in (q, k, v)), cache)
            yield out

    return directly


def begin_quest(q, k, v):
    cache = init_paged_cache(BATCH, 16, 8, 2, 8, page_size=4, dtype=jnp.float32)
    return append_quest(cache, init_quest(cache), k, v)


def step_quest(q, k, v, cache):
    cache = append_quest(*cache, k, v)
    return quest(q, *cache, budget=8, scale=0.6), cache


def double_sparsity_directly(q, k, v, *_):
    """Row by row."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    products = np.abs(q.reshape(BATCH, LENGTH, 2, 2, 8) * k[:, :, :, None])[:, :PROMPT].sum((1, 3))
    append = jit(append_labels)
    read = jit(lambda *state: double_sparsity(*state, heavy=5, scale=0.6))
    outs = np.zeros((BATCH, LENGTH - PROMPT, HEADS, 8), np.float32)
    for row in range(BATCH):
        channels = np.argsort(-products[row], axis=-1, kind="stable")[:, :3]
        cache = init_paged_cache(1, 8, 8, 2, 8, page_size=4, dtype=jnp.float32)
        labels = init_labels(cache, channels)
        cache, labels = append(cache, labels, channels, k[row, None, :PROMPT], v[row, None, :PROMPT])
        for i in range(PROMPT, LENGTH):
            cache, labels = append(cache, labels, channels, k[row, None, i, None], v[row, None, i, None])
            outs[row, i - PROMPT] = read(q[row, None, i, None], cache, labels, channels)[0, 0]
    yield outs


def begin_clusters(q, k, v):
    cache = init_cluster_cache(BATCH, LENGTH, 2, 8, clustering=CLUSTERING, dtype=jnp.float32)
    return prefill_clusters(cache, k, v, clustering=CLUSTERING)


def streaming_directly(q, k, v, unrotated_q, unrotated_k):
    options = {"start": 2, "recent": 3, "scale": 0.6, "rotate": dense().rotated}
    yield streaming_attention(unrotated_q[:, PROMPT:], unrotated_k, v, **options)


OF_CLUSTERS = {"clustering": CLUSTERING, "scale": 0.6}
DIRECTLY = {
    "quest": by_steps(begin_quest, step_quest),
    "double_sparsity": double_sparsity_directly,
    "h2o": by_steps(
        lambda *qkv: h2o_prefill(*qkv, heavy=4, recent=3, scale=0.6)[1], functools.partial(h2o, recent=3, scale=0.6)
    ),
    "snapkv": by_steps(
        lambda *qkv: snapkv_prefill(*qkv, room=6, window=4, capacity=8, kernel=3, scale=0.6)[1],
        functools.partial(snapkv, scale=0.6),
    ),
    "cluster_kv": by_steps(begin_clusters, functools.partial(cached_cluster_kv, budget=6, **OF_CLUSTERS)),
    "retro": by_steps(begin_clusters, functools.partial(cached_retro, retrieval=0.2, estimation=0.3, **OF_CLUSTERS)),
    "streaming": streaming_directly,
}


@pytest.mark.parametrize("name", FEW_THAT_ARE_KEPT)
@pytest.mark.quick_cases(1)
def test_tokens_are_read_as_the_functions_read_them(name):
    layer = AttachedAttention(dense(), decode=name, decode_options=FEW_THAT_ARE_KEPT[name])
    got = np.asarray(prefilled_and_decoded(layer, X)[0])
    everything = np.asarray(forward(dense(), X))
    agree(everything[:, :PROMPT], got[:, :PROMPT], "prompt")
    out = jnp.concatenate(list(DIRECTLY[name](*projected(dense(), X))), axis=1)
    agree(of_heads(out, X[:, PROMPT:]), got[:, PROMPT:], "after it")
    assert np.abs(got - everything).max() > 0.01 * np.abs(everything).max()


def test_a_prompt_read_sparsely_is_decoded_by_another_mechanism():
    few, all_kept = FEW_OF_A_PROMPT["xattention"], ALL_THAT_IS_KEPT["h2o"]
    layer = AttachedAttention(dense(), prefill="xattention", decode="h2o", prefill_options=few, decode_options=all_kept)
    got = prefilled_and_decoded(layer, X)[0]
    sparse = AttachedAttention(dense(), prefill="xattention", prefill_options=few)
    agree(forward(sparse, X[:, :PROMPT]), got[:, :PROMPT])
    agree(forward(dense(), X)[:, PROMPT:], got[:, PROMPT:])


def test_rows_do_not_depend_on_each_other():
    layer = AttachedAttention(dense(), decode="double_sparsity", decode_options=FEW_THAT_ARE_KEPT["double_sparsity"])
    both, _ = prefilled_and_decoded(layer, X)
    exchanged, _ = prefilled_and_decoded(layer, np.stack([X[1], -X[0]]))
    agree(both[1], exchanged[0])


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("name", [None, *DECODERS])
def test_a_state_keeps_its_types(name):
    """In bfloat16, too: it is the carry of a loop."""
    options = FEW_THAT_ARE_KEPT.get(name, {})
    layer = nnx.eval_shape(lambda: Attention(DIM, **OPTIONS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layer = AttachedAttention(layer, decode=name, decode_options=options)
    x = jax.ShapeDtypeStruct((BATCH, PROMPT, DIM), jnp.bfloat16)
    one = jax.ShapeDtypeStruct((BATCH, 1, DIM), jnp.bfloat16)
    run = lambda layer, x, one: layer(one, layer(x, layer.init_state(BATCH, LENGTH))[1])  # noqa: E731
    y, after = jax.eval_shape(run, layer, x, one)
    before = jax.eval_shape(lambda layer, x: layer(x, layer.init_state(BATCH, LENGTH))[1], layer, x)
    assert y.dtype == jnp.bfloat16
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)  # noqa: E731
    assert kinds(before) == kinds(after)


def test_structure_compares_by_value():
    """So that a model attached twice runs the same program."""
    make = lambda: AttachedAttention(  # noqa: E731
        dense(),
        prefill="minference",
        decode="h2o",
        prefill_options=FEW_OF_A_PROMPT["minference"],
        decode_options=FEW_THAT_ARE_KEPT["h2o"],
    )
    assert nnx.split(make())[0] == nnx.split(make())[0]
    assert hash(nnx.split(make())[0]) == hash(nnx.split(make())[0])
    assert set(PREFILLS) == set(FEW_OF_A_PROMPT)
    assert set(DECODERS) == set(FEW_THAT_ARE_KEPT)


def of(layer_options=(), **options):
    return lambda: AttachedAttention(Attention(8, heads=2, **dict(layer_options), rngs=nnx.Rngs(0)), **options)


WRONG = {
    "window: got 3; needs None": of({"window": 3}),
    "sinks: got True; needs False": of({"sinks": True}),
    "logits_soft_cap: got 30.0; needs None": of({"logits_soft_cap": 30.0}),
    "own_keys: got False; needs True": of({"own_keys": False}),
    "cache_dtype: got int8; needs None": of({"cache_dtype": "int8"}),
    "prefill: got 'quest'; needs None, a function or one of minference": of(prefill="quest"),
    "decode: got 'xattention'; needs None or one of quest": of(decode="xattention"),
    "prefill_options: got 'budget'; needs options of xattention: block_size": of(
        prefill="xattention", prefill_options={"budget": 3}
    ),
    "prefill_options: got ['tau']; needs none": of(prefill_options={"tau": 3}),
    "decode_options: got ['budget']; needs none": of(decode_options={"budget": 3}),
    "decode_options: got 'heavy'; needs options of Quest: budget": of(decode="quest", decode_options={"heavy": 3}),
    "decode_options: got no 'budget'; needs": of(decode="quest"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_combine(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nnx.eval_shape(WRONG[message])
    assert "\n" not in str(error.value)


def test_calls_that_do_not_fit():
    layer = AttachedAttention(dense())
    state = layer.init_state(BATCH, PROMPT)
    for message, call in {
        "segment_ids: got ids": lambda: layer(X, segment_ids=np.zeros((BATCH, LENGTH), np.int32)),
        f"x: got {LENGTH} tokens; needs a prompt of 1 to {PROMPT}": lambda: layer(X, state),
        "x: got 0 tokens": lambda: layer(X[:, :0], state),
        "x: got shape (1, 30, 32)": lambda: layer(X[:1], state),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            jax.eval_shape(call)
