"""Sparse reading of a trained model: with a budget for everything it is the dense model, with less it is another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.models import LanguageModel, generate
from tests.compiled import jit

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 48)))
STEPS = 6


@functools.cache
def dense():
    attention = {"heads": 4, "kv_heads": 2, "qk_norm": True}
    return LanguageModel(
        vocab_size=31,
        dim=32,
        mlp_dim=48,
        pattern=("attention",),
        repeats=2,
        mixers={"attention": attention},
        rngs=nnx.Rngs(0),
    )


def logits(model):
    return jit(lambda model: model(TOKENS)[0])(model)


WHOLE = {
    "flexprefill": {"block_size": 16, "gamma": 1.0, "min_budget": 48},
    "xattention": {"block_size": 16, "stride": 8, "tau": 1.0},
    "streaming": {"start": 4, "recent": 64},
}
DECODE = {
    "quest": ({"budget": 64}, {"budget": 16}),
    "double_sparsity": ({"heavy": 64, "channels": 8}, {"heavy": 8, "channels": 2}),
    "h2o": ({"heavy": 32, "recent": 32}, {"heavy": 4, "recent": 4}),
    "snapkv": ({"window": 8, "capacity": 64}, {"window": 8, "capacity": 12}),
    "cluster_kv": ({"budget": 64}, {"budget": 20}),
    "streaming": ({"start": 4, "recent": 64}, {"start": 2, "recent": 6}),
}


def test_nothing_attached_is_the_dense_model():
    np.testing.assert_allclose(logits(dense().with_attention()), logits(dense()), atol=1e-5)


def test_a_function_of_the_user_reads_the_prompt():
    def last_token_only(q, k, v, *, scale):
        return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)

    got = logits(dense().with_attention(prefill=last_token_only))
    assert float(jnp.max(jnp.abs(got - logits(dense())))) > 1e-2


def test_parameters_are_shared():
    one, other = (
        jax.tree.leaves(nnx.state(m, nnx.Param))
        for m in (dense(), dense().with_attention(decode="h2o", decode_options={"heavy": 4, "recent": 4}))
    )
    assert all(a is b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", WHOLE)
def test_prefill_of_everything_is_dense(name):
    model = dense().with_attention(prefill=name, prefill_options=WHOLE[name])
    np.testing.assert_allclose(logits(model), logits(dense()), atol=2e-5)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.quick_cases(2)
def test_decoding_with_room_for_everything_is_dense(name):
    model = dense().with_attention(decode=name, decode_options=DECODE[name][0])
    want = generate(dense(), TOKENS, max_new_tokens=STEPS, temperature=0.0)
    np.testing.assert_array_equal(generate(model, TOKENS, max_new_tokens=STEPS, temperature=0.0), want)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.slow
def test_decoding_with_less_is_another_model(name):
    """Scores after the prompt and three tokens more differ from the dense ones, and are finite."""
    step = jit(lambda model, tokens, state: model(tokens, state))
    found = []
    for model in (dense(), dense().with_attention(decode=name, decode_options=DECODE[name][1])):
        _, state = step(model, TOKENS[:, :45], model.init_state(2, 64))
        found.append(step(model, TOKENS[:, 45:46], state)[0])
    assert bool(jnp.all(jnp.isfinite(found[1])))
    assert float(jnp.max(jnp.abs(found[1] - found[0]))) > 1e-4


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"prefill": "x"}, "prefill"),
        ({"decode": "x"}, "decode"),
        ({"prefill_options": {"threshold": 1}}, "prefill_options"),
        ({"prefill": "xattention", "prefill_options": {"treshold": 1}}, "prefill_options"),
        ({"decode": "quest", "decode_options": {"pages": 1}}, "decode_options"),
        ({"layers": [3]}, "layers"),
    ],
)
def test_errors(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        dense().with_attention(**options)
