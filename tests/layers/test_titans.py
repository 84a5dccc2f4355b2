"""The Titans layers against their equations, written plainly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Titans, TitansMAC, TitansMAG, TitansMAL
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.models import Block
from tests.layers.catalogue import BATCH, DIM, agree, filled, forward, inputs, jit, layer, random

OPTIONS = {"heads": 2, "head_dim": 6, "depth": 1, "chunk": 4}


def turned(x, theta=10_000.0):
    """Rotary positions 0, 1, ... of [B, T, H, K]: pairs (x_i, x_{i + K/2}) as complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def softmax(q, keys, values, mask):
    """[B, T, H, K] over [B, M, H, K] where the mask [T, M] allows; scores of each part are given turned or not."""
    s = np.where(mask, keys, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhtm,bmhk->bthk", p / p.sum(-1, keepdims=True), values)


def scores(q, k):
    return np.einsum("bthk,bmhk->bhtm", q, k) * q.shape[-1] ** -0.5


def test_window_attention_sees_its_window_and_the_persistent_tokens():
    attention, x = layer("titans_mag").attention, inputs(17)
    project = lambda name, x: np.asarray(attention.by_head(getattr(attention, name)(x)), np.float64)  # noqa: E731
    p = np.tile(attention.persistent[...], (BATCH, 1, 1))
    q, k, v = (project(name, x) for name in ("q_proj", "k_proj", "v_proj"))
    always, always_v = project("k_proj", p), project("v_proj", p)
    back = np.arange(17)[:, None] - np.arange(17)
    mask = np.concatenate([np.ones((17, p.shape[1]), bool), (back >= 0) & (back < attention.window)], 1)
    s = np.concatenate([scores(q, always), scores(turned(q), turned(k))], -1)
    want = softmax(q, s, np.concatenate([always_v, v], 1), mask)
    agree(want.reshape(BATCH, 17, -1), forward(attention, x))


@pytest.mark.slow
def test_memory_that_learns_and_forgets_nothing_is_its_start():
    memory, x = filled(lambda: Titans(DIM, **OPTIONS | {"depth": 2}, rngs=nnx.Rngs(0))).memory, inputs(11)
    still = lambda bias: bias.set_value(jnp.full_like(bias[...], -1e9))  # noqa: E731
    still(memory.theta_bias)
    still(memory.alpha_bias)
    q = l2_norm(memory.qkv(x)[0])
    W1, W2 = memory.start()
    want = jnp.einsum("bthf,hfv->bthv", jax.nn.gelu(jnp.einsum("bthk,hkf->bthf", q, W1)), W2)
    agree(np.asarray(want), forward(memory, x))


@pytest.mark.slow
def test_memory_as_a_context_segment_by_segment():
    """Whole segments one after the other: what the memory says before each, a plain softmax, what it learns from it."""
    mac, x = layer("titans_mac"), inputs(17)
    by_head = lambda x: np.asarray(x, np.float64).reshape(*x.shape[:2], mac.heads, mac.head_dim)  # noqa: E731
    asks, _ = mac.ask_conv(mac.ask_proj(x))
    asks = l2_norm(asks.reshape(BATCH, 17, mac.heads, mac.head_dim))
    p = np.tile(mac.persistent[...], (BATCH, 1, 1))
    memory, state = jit(lambda memory, y, state: memory(y, state)), mac.memory.init_state(BATCH)
    start, outs = mac.memory.start(), []
    for first in range(0, 17, mac.segment):
        part = slice(first, first + mac.segment)
        said = mac.memory.ask(asks[:, part], start)
        h = mac.said_proj(mac.said_norm(said.reshape(*said.shape[:2], -1)))
        q, k, v = (by_head(project(x[:, part])) for project in (mac.q_proj, mac.k_proj, mac.v_proj))
        size, count = q.shape[1], p.shape[1]
        s = [scores(q, by_head(mac.k_proj(p))), *(scores(turned(q), turned(y)) for y in (by_head(mac.k_proj(h)), k))]
        values = np.concatenate([by_head(mac.v_proj(p)), by_head(mac.v_proj(h)), v], 1)
        causal = np.tril(np.ones((size, size), bool))
        mask = np.concatenate([np.ones((size, count), bool), causal, causal], 1)
        y = softmax(q, np.concatenate(s, -1), values, mask).reshape(BATCH, size, -1).astype(np.float32)
        m, state = memory(mac.memory, y, state)
        start = state.memory.memory
        gate = jax.nn.sigmoid(mac.memory_norm(m.reshape(y.shape))) * jax.nn.silu(mac.gate_proj(x[:, part]))
        outs.append(mac.out_proj(mac.attention_norm(y) * gate))
    agree(np.concatenate(outs, 1), forward(mac, x))


@pytest.mark.parametrize("name", ["titans_mac", "titans_mag", "titans_mal"])
def test_a_changed_token_changes_nothing_before_it(name):
    x = inputs(17)
    for j in (3, 4, 11):
        other = x.copy()
        other[:, j:] = random("other", BATCH, 17, DIM)[:, j:]
        before, after = (np.asarray(forward(layer(name), y)) for y in (x, other))
        np.testing.assert_array_equal(before[:, :j], after[:, :j])
        assert np.abs(before[:, j] - after[:, j]).min(axis=-1).max() > 0


@pytest.mark.slow
def test_an_untrained_memory_stays_bounded():
    """Keys all alike, over a thousand tokens: the steps at the start do not overshoot."""
    memory = Titans(DIM, heads=1, head_dim=32, rngs=nnx.Rngs(0)).memory
    x = np.tile(inputs(1), (1, 1000, 1))
    y, v = np.asarray(forward(memory, x)), np.asarray(memory.qkv(x)[2])
    assert np.abs(y).max() < 2 * np.abs(v).max()


def titans(kind, **options):
    return lambda rngs: kind(DIM, **OPTIONS | options, rngs=rngs)


WRONG = {
    "heads: got 3": titans(Titans, heads=3, head_dim=None),
    "depth: got 0": titans(Titans, depth=0),
    "expand: got 0": titans(TitansMAG, expand=0),
    "max_step: got 0": titans(Titans, max_step=0),
    "window: got 0": titans(TitansMAG, window=0),
    "persistent: got -1": titans(TitansMAL, persistent=-1),
    "head_dim: got 5": titans(TitansMAC, head_dim=5),
    "segment: got 0": titans(TitansMAC, segment=0),
    "mixer 'titans': ": lambda rngs: Block(DIM, "titans", {"window": 4}, mlp_dim=0, rngs=rngs),
}


@pytest.mark.parametrize("message", WRONG)
def test_options(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nnx.eval_shape(lambda: WRONG[message](nnx.Rngs(0)))
    assert "\n" not in str(error.value)
