"""A mixture of experts against a loop over tokens and experts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers.moe import MoE
from effattn_jax.models import LanguageModel, training_flops_per_token
from tests.compiled import jit

DIM, HIDDEN, EXPERTS = 8, 6, 6
CASES = {
    "softmax": {},
    "softmax, not renormalised": {"renormalise": False, "top_k": 3},
    "one expert": {"experts": 1, "top_k": 1},
    "sigmoid, corrected, in groups, scaled": {
        "score": "sigmoid", "correction": True, "groups": 3, "top_groups": 2, "top_k": 3, "scale": 2.446,
    },
    "shared": {"shared_dim": 5},
    "shared behind a gate": {"shared_dim": 5, "shared_gate": True},
    "biases, clamped": {"bias": True, "activation": "clamped_swiglu"},
}  # fmt: skip


def layer(options):
    made = MoE(DIM, HIDDEN, **{"experts": EXPERTS, "top_k": 2, **options}, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(draw, state))


def silu(x):
    return x / (1 + np.exp(-x))


def by_loops(moe, x, *, score="softmax", renormalise=True, groups=1, top_groups=1, scale=1.0, activation="silu", **_):
    """float64, one token after the other."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(moe)))
    out = np.zeros(x.shape)
    for n, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ p["router"]["kernel"] + p["router"].get("bias", 0)
        e = np.exp(logits - logits.max())
        scores = e / e.sum() if score == "softmax" else 1 / (1 + np.exp(-logits))
        choice = scores + p["router"].get("correction", 0)
        members = np.split(np.arange(len(choice)), groups)
        best = sorted(range(groups), key=lambda g: -np.sort(choice[members[g]])[-2:].sum())[:top_groups]
        allowed = sorted(itertools.chain(*(members[g] for g in best)), key=lambda e: -choice[e])[: moe.top_k]
        total = sum(scores[e] for e in allowed) if renormalise else 1.0
        for e in allowed:
            of = lambda name, rows, e=e: rows @ p[name]["kernel"][e] + p[name].get("bias", {e: 0})[e]  # noqa: E731
            gate, up = of("gate", token), of("up", token)
            if activation == "silu":
                hidden = silu(gate) * up
            else:
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
                hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            out[n] += scale * scores[e] / total * of("down", hidden)
        if "shared" in p:
            of = lambda name, rows: rows @ p["shared"][name]["kernel"]  # noqa: E731
            shared = of("down", silu(of("gate", token)) * of("up", token))
            if "shared_gate" in p:
                shared = shared / (1 + np.exp(-token @ p["shared_gate"]["kernel"]))
            out[n] += shared
    return out


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("case", CASES)
def test_against_loops(case):
    moe = layer(CASES[case])
    x = np.random.default_rng(1).standard_normal((2, 7, DIM)).astype(np.float32) * 2
    want = by_loops(moe, x.reshape(-1, DIM), **CASES[case]).reshape(x.shape)
    np.testing.assert_allclose(jit(lambda moe, x: moe(x))(moe, x), want, atol=2e-4, rtol=1e-4)


def test_all_tokens_at_one_expert():
    """A bias sends every token to the last expert: nothing is dropped, the others stay without a gradient."""
    moe = layer({"bias": True, "top_k": 1})
    moe.router.bias[...] = jnp.zeros(EXPERTS).at[-1].set(1e3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 33, DIM)), jnp.float32)
    gradient = jit(jax.grad(lambda moe, x: jnp.sum(jnp.sin(moe(x)))))(moe, x)
    assert np.all(np.asarray(gradient.up.kernel[...])[:-1] == 0)
    assert np.all(np.any(np.asarray(gradient.up.kernel[...])[-1] != 0, axis=0))
    np.testing.assert_allclose(moe(x), by_loops(moe, x[0], activation="silu")[None], atol=2e-4, rtol=1e-4)


def test_gradients_by_differences():
    moe = layer({"shared_dim": 5, "shared_gate": True})
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 5, DIM)), jnp.float32)
    graph, state = nnx.split(moe)
    of = lambda state, x: jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))  # noqa: E731
    loss = jit(of)
    gradient = jit(jax.grad(of, argnums=(0, 1)))(state, x)
    rng = np.random.default_rng(2)
    step = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), (state, x))
    moved = lambda size: loss(*jax.tree.map(lambda a, b: a + size * b, (state, x), step))  # noqa: E731
    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    want = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    np.testing.assert_allclose(slope, want, rtol=2e-2)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"top_k": 7}, "top_k"),
        ({"groups": 4}, "groups"),
        ({"score": "hash"}, "score"),
        ({"activation": "relu"}, "activation"),
        ({"shared_gate": True}, "shared_gate"),
    ],
)
def test_errors(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        layer(options)


@pytest.mark.slow
def test_in_a_model():
    """Blocks with experts beside one without; only k of E experts count as work."""
    sizes = {"vocab_size": 11, "dim": DIM, "mlp_dim": HIDDEN, "pattern": ("dense", "sparse"), "repeats": 2}
    attention = {"kind": "attention", "heads": 2}
    options = {"mlp": "moe", "mlp_options": {"experts": EXPERTS, "top_k": 2}}
    model = LanguageModel(**sizes, mixers={"dense": attention, "sparse": attention | options}, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9)))
    logits, _ = jit(lambda model, tokens: model(tokens))(model, tokens)
    assert logits.shape == (2, 9, 11)
    assert bool(jnp.all(jnp.isfinite(logits)))
    of_a_block = 4 * DIM * DIM + 3 * DIM * HIDDEN
    matrices = 2 * of_a_block + 2 * (4 * DIM * DIM + 2 * 3 * DIM * HIDDEN + DIM * EXPERTS) + 11 * DIM
    assert training_flops_per_token(model, 9) == 3 * (2 * matrices + 4 * 4 * DIM * 5)
