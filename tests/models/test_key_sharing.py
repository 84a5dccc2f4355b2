"""Layers that read the keys and values of layers below: against loops over heads and tokens, and with caches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention
from effattn_jax.models import LanguageModel, generate, sizes
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.models.key_sharing import carried
from effattn_jax.sparse import KVCache
from tests.layers.catalogue import agree, decode_documents, filled, jit

VOCAB, DIM, HEADS, HEAD, WINDOW, LENGTH = 23, 8, 4, 6, 5, 14
LOCAL = {"kind": "attention", "heads": HEADS, "kv_heads": 1, "head_dim": HEAD, "window": WINDOW}
GLOBAL = {"kind": "attention", "heads": HEADS, "kv_heads": 2, "head_dim": HEAD, "rope_theta": 1000.0}
MIXERS = {
    "local": LOCAL,
    "near": LOCAL | {"kv_from": "local", "window": 3, "sinks": True},
    "global": GLOBAL,
    "far": GLOBAL | {"kv_from": "global"},
}
LAYERS = {
    "in a repetition, from before it": (("global",), ("local", "near", "far"), 2, ()),
    "from the repetition before": (("local", "global"), ("near", "far", "local"), 2, ("near",)),
    "after the last repetition": (("global",), ("local", "far"), 2, ("near", "far")),
}
EVERY = pytest.mark.parametrize("layers", LAYERS)
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, LENGTH))
apply = jit(lambda model, tokens: model(tokens)[0])
call = jit(lambda model, tokens, state: model(tokens, state))


def build(layers, mixers, **changes):
    before, pattern, repeats, after = layers
    parts = {"before": before, "pattern": pattern, "repeats": repeats, "after": after}
    sizes = {"vocab_size": VOCAB, "dim": DIM, "mlp_dim": 0}
    return LanguageModel(**sizes | parts | changes, mixers=mixers, rngs=nnx.Rngs(0))


def make(layers, mixers=MIXERS, **changes):
    return filled(lambda: build(LAYERS[layers], mixers, **changes))


def names(layers):
    before, pattern, repeats, after = LAYERS[layers]
    return (*before, *pattern * repeats, *after)


def places(layers):
    """Where the parameters of each layer are: below which name, and at which index."""
    before, pattern, repeats, after = LAYERS[layers]
    yield from ((f"before.blocks.{i}", ()) for i in range(len(before)))
    yield from ((f"units.blocks.{i}", (r,)) for r in range(repeats) for i in range(len(pattern)))
    yield from ((f"after.blocks.{i}", ()) for i in range(len(after)))


def rotated(x, theta):
    """[T, H, K]: pairs of channels turn by the position of their token."""
    half = x.shape[-1] // 2
    out = x.copy()
    for t, i in np.ndindex(len(x), half):
        angle = t * theta ** (-i / half)
        a, b = x[t, :, i], x[t, :, i + half]
        out[t, :, i], out[t, :, i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def logits_of_a_row(layers, p, tokens):
    norm = lambda x, scale: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale  # noqa: E731
    x, made = p["embedding"][tokens], {}
    for name, (place, at) in zip(names(layers), places(layers), strict=True):
        own = lambda key, place=place, at=at: p[f"{place}.{key}"][at]  # noqa: E731
        options = MIXERS[name]
        theta = options.get("rope_theta", 10_000.0)
        h = norm(x, own("norm.scale"))
        heads = lambda y: y.reshape(len(y), -1, HEAD)  # noqa: E731
        if "kv_from" not in options:
            k, v = (heads(h @ own(f"mixer.{part}_proj.kernel")) for part in "kv")
            made[name] = rotated(k, theta), v
        k, v = made[options.get("kv_from", name)]
        q, o = rotated(heads(h @ own("mixer.q_proj.kernel")), theta), np.zeros((len(x), HEADS, HEAD))
        for t, head in np.ndindex(len(x), HEADS):
            first = max(0, t - options.get("window", len(x)) + 1)
            group = head * k.shape[1] // HEADS
            weights = np.exp(k[first : t + 1, group] @ q[t, head] * HEAD**-0.5)
            sink = np.exp(own("mixer.sinks")[head]) if options.get("sinks") else 0
            o[t, head] = weights @ v[first : t + 1, group] / (weights.sum() + sink)
        x = x + o.reshape(len(x), -1) @ own("mixer.out_proj.kernel")
    return norm(x, p["final_norm.scale"]) @ p["embedding"].T


def numbers(model):
    return {name: np.asarray(x, np.float64) for name, x in parameters_of(model).items()}


@pytest.mark.quick_cases(1)
@EVERY
def test_against_loops(layers):
    model = make(layers)
    shared = {name for name in parameters_of(model) if "k_proj" in name}
    assert len(shared) == sum("kv_from" not in MIXERS[name] for part in LAYERS[layers] if part != 2 for name in part)
    agree(np.stack([logits_of_a_row(layers, numbers(model), row) for row in TOKENS]), apply(model, TOKENS))


@EVERY
@pytest.mark.slow
def test_gradients_of_all_readers_reach_the_keys(layers):
    """Along a random direction of all keys and values, against differences of the loops."""
    model, row = make(layers, remat=True), TOKENS[0]
    weights = np.random.default_rng(1).standard_normal((LENGTH, VOCAB))
    gradients = jit(jax.grad(lambda model: jnp.sum(model(TOKENS[:1])[0][0] * weights)))(model)
    p, draw = numbers(model), np.random.default_rng(2)
    moved = {name: draw.standard_normal(x.shape) for name, x in p.items() if "k_proj" in name or "v_proj" in name}
    step = 1e-5
    along = lambda sign: p | {name: p[name] + sign * step * d for name, d in moved.items()}  # noqa: E731
    value = lambda sign: np.sum(logits_of_a_row(layers, along(sign), row) * weights)  # noqa: E731
    want = (value(1) - value(-1)) / (2 * step)
    found = parameters_of(gradients)
    got = sum(np.sum(np.asarray(found[name], np.float64) * d) for name, d in moved.items())
    assert abs(got - want) < 1e-4 * abs(want)


@EVERY
@pytest.mark.quick_cases(1)
def test_prefill_and_decoding_are_one_pass(layers):
    model = make(layers)
    state, parts, start = model.init_state(2, LENGTH), [], 0
    for count in (6, 6, 1, 1):
        logits, state = call(model, TOKENS[:, start : start + count], state)
        parts.append(logits)
        start += count
    agree(np.asarray(apply(model, TOKENS)), np.concatenate(parts, axis=1))


@pytest.mark.slow
@EVERY
def test_documents_token_by_token(layers):
    model = make(layers)
    ids = np.int32([[0] * 3 + [1] * 8 + [2] * 3, [-1] * 2 + [4] * 9 + [6] * 2 + [-1]])
    want = np.asarray(jit(lambda model, tokens, ids: model(tokens, segment_ids=ids)[0])(model, TOKENS, ids))
    logits, _ = decode_documents(model, TOKENS, model.init_state(2, LENGTH), ids)
    agree(want[ids >= 0], np.asarray(logits)[ids >= 0])


@pytest.mark.slow
def test_padded_prompts_continue_as_if_alone():
    model = make("from the repetition before")
    prompts = [TOKENS[0], TOKENS[1, :9]]
    options = {"max_new_tokens": 4, "temperature": 0.0}
    together = generate(model, prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(generate(model, [prompt], **options)[0], row)


@EVERY
def test_a_cache_for_each_layer_with_keys(layers):
    model = make(layers)
    state = jax.eval_shape(lambda: model.init_state(1, LENGTH))
    is_cache = lambda part: isinstance(part, KVCache)  # noqa: E731
    parts = {"before": state.before, "repeated": state.repeated, "after": state.after}
    found = {key: sum(map(is_cache, jax.tree.leaves(part, is_leaf=is_cache))) for key, part in parts.items()}
    before, pattern, _, after = LAYERS[layers]
    count = lambda part: sum("kv_from" not in MIXERS[name] for name in part)  # noqa: E731
    assert found == {"before": count(before), "repeated": count(pattern), "after": count(after)}
    per_cache = {"local": 2 * WINDOW * HEAD * 4 + WINDOW * 4 + 8, "global": 2 * LENGTH * 2 * HEAD * 4 + LENGTH * 4 + 8}
    caches = sum(per_cache[name] for name in names(layers) if name in per_cache)
    assert sizes(model, LENGTH).cache_bytes == caches


@pytest.mark.slow
def test_rounded_keys_and_values():
    """The error of an int8 cache against the one pass, and its bytes: a number for each channel, a scale for each."""
    rounded = {name: options | {"cache_dtype": "int8"} for name, options in MIXERS.items()}
    layers = "in a repetition, from before it"
    model, exact = make(layers, rounded), make(layers)
    state, want = model.init_state(2, LENGTH), np.asarray(apply(exact, TOKENS))
    first, state = call(model, TOKENS[:, :12], state)
    second, state = call(model, TOKENS[:, 12:13], state)
    third, _ = call(model, TOKENS[:, 13:], state)
    got = np.concatenate([first, second, third], axis=1)
    error = np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2))
    assert 0.005 < error < 0.03  # 0.019 through seven layers of wide weights
    saved = sizes(exact, LENGTH).cache_bytes - sizes(model, LENGTH).cache_bytes
    vectors = 2 * (2 * LENGTH + 2 * WINDOW)  # keys and values of one global layer and two local ones, of all heads
    assert saved == vectors * (3 * HEAD - 4)


@pytest.mark.slow
def test_remat_is_the_same():
    model, again = make("after the last repetition"), make("after the last repetition", remat=True)
    loss = jit(jax.grad(lambda model: jnp.sum(jnp.sin(model(TOKENS)[0]))))
    for name, x in parameters_of(loss(model)).items():
        agree(np.asarray(x), parameters_of(loss(again))[name], name)


def test_what_crosses_from_one_repetition_to_the_next():
    of = lambda pattern, after=(): carried(MIXERS, pattern, after)  # noqa: E731
    assert of(("local", "near", "far")) == set()
    assert of(("near", "local")) == {"local"}
    assert of(("local", "global"), ("far", "near")) == {"local", "global"}
    assert of(("local", "near"), ("local", "near")) == set()


def changed(name, **options):
    return MIXERS | {name: {key: x for key, x in (MIXERS[name] | options).items() if x is not None}}


ERRORS = {
    "near.kv_from: got 'local'; needs a layer below the first 'near': ['global']": (
        MIXERS,
        (("global",), ("near", "local"), 2, ()),
    ),
    "near.kv_from: got 'far'; needs a layer with keys of its own": (changed("near", kv_from="far"), None),
    "near.kv_from: got 'attention' that reads 'mamba2'; needs both of attention": (
        changed("local", kind="mamba2"),
        None,
    ),
    "far.kv_heads: got 1; needs 2, that of 'global', whose keys it reads": (changed("far", kv_heads=1), None),
    "far.rope_theta: got None; needs 1000.0, that of 'global'": (changed("far", rope_theta=None), None),
    "near.window: got None; needs at most 5, that of 'local'": (changed("near", window=None), None),
    "near.window: got 6; needs at most 5, that of 'local'": (changed("near", window=6), None),
    "cache_dtype: got 'int4'; needs None or 'int8'": (changed("local", cache_dtype="int4"), None),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    mixers, layers = ERRORS[message]
    layers = (("global", "local"), ("far", "near"), 2, ()) if layers is None else layers
    with pytest.raises(ValueError, match=re.escape(message)):
        blueprint(lambda: build(layers, mixers))


def test_a_layer_without_keys_needs_some():
    layer = Attention(DIM, heads=2, own_keys=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="own_keys: got False; needs keys of a layer below"):
        layer(jnp.zeros((1, 3, DIM)))
