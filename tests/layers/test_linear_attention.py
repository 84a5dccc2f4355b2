"""Linear attention, retention and lightning attention against public implementations; Performers that are redrawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import FastWeight, LightningAttention, LinearAttention, MultiScaleRetention, Performer
from effattn_jax.layers.lightning import alibi_slopes
from effattn_jax.layers.performer import redraw
from effattn_jax.layers.positions import document_positions
from effattn_jax.layers.retention import pair_rotation, retention_decay
from effattn_jax.models import LanguageModel
from tests.layers.catalogue import DIM, agree, filled, forward, inputs, jit, layer, random
from tests.layers.golden import assert_fla_model, golden, load, under
from tests.linear.det import det


def kernels(t, **names):
    return {f"{ours}.kernel": t[f"{theirs}.weight"].T for ours, theirs in names.items()}


def linear_attention_weights(t, config, layer):
    """The reference has one feature map for all heads."""
    heads = config["num_heads"]
    names = {"weight": "layer1", "other_weight": "layer2"}
    biases = {"bias": "layer1", "other_bias": "layer2"}
    weights = kernels(t, q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", out_proj="o_proj")
    for ours, theirs in (("phi", "feature_map_q"), ("k_phi", "feature_map_k")):
        for name, part in names.items():
            weights[f"{ours}.{name}"] = np.tile(t[f"{theirs}.{part}.weight"].T, (heads, 1, 1))
        for name, part in biases.items():
            weights[f"{ours}.{name}"] = np.tile(t[f"{theirs}.{part}.bias"], (heads, 1))
    return weights | {"norm.scale": t["norm.weight"]}


@pytest.mark.slow
def test_fla_linear_attention():
    def options(config, layer):
        own = {"feature_map": config["feature_map"], "normalise": False, "scale": None, "output_norm": True}
        return own | {"heads": config["num_heads"], "norm_eps": config["norm_eps"]}

    assert_fla_model("fla_linear_attn", "linear_attention", options, linear_attention_weights)


def test_fla_retention():
    """The reference turns halves, not neighbours, and has a scale in its norm."""

    def options(config, layer):
        own = {"rotation": "rope", "norm_affine": True, "norm_eps": config["norm_eps"]}
        return own | {"heads": config["num_heads"]}

    def weights(t, config, layer):
        names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "gate_proj": "g_proj"}
        return kernels(t, **names, out_proj="o_proj") | {"norm.scale": t["g_norm_swish_gate.weight"]}

    assert_fla_model("fla_retnet", "retention", options, weights)


def rms_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


def mixture(x, t, config):
    """All experts on all tokens; the best ones weighted by the softmax over them."""
    scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ t["gate.weight"].T), config["num_experts_per_tok"])
    weights = jnp.einsum("btk,btke->bte", scores / scores.sum(-1, keepdims=True), jax.nn.one_hot(chosen, 4))
    y = 0
    for expert in range(config["num_local_experts"]):
        gate, down, up = (t[f"experts.{expert}.w{i}.weight"].T for i in (1, 2, 3))
        y += weights[..., expert, None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return y


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("index", [0, 1])
def test_lightning_is_minimax(index):
    """The layers of linear attention; residuals of MiniMax-01 are of the normed input, and its experts are written
    here."""
    g = golden("minimax_text01")
    t, config = under(f"model.layers.{index}.", g.tensors), g.config
    own = under("self_attn.", t)
    weights = kernels(own, qkv_proj="qkv_proj", gate_proj="output_gate", out_proj="out_proj")
    make = lambda: LightningAttention(  # noqa: E731
        config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        norm_eps=1e-6,
        layer_index=index,
        layer_count=config["num_hidden_layers"],
        rngs=nnx.Rngs(0),
    )
    slopes = make().slopes[...]
    np.testing.assert_allclose(slopes, own["slope_rate"][:, 0, 0], rtol=1e-6)
    mixer = load(make, weights | {"norm.scale": own["norm.weight"], "slopes": slopes})

    def block(mixer, x):
        h = rms_norm(x, t["input_layernorm.weight"], config["rms_norm_eps"])
        x = config["linear_attn_alpha_factor"] * h + config["linear_attn_beta_factor"] * mixer(h)[0]
        h = rms_norm(x, t["post_attention_layernorm.weight"], config["rms_norm_eps"])
        return config["mlp_alpha_factor"] * h + config["mlp_beta_factor"] * mixture(
            h, under("block_sparse_moe.", t), config
        )

    np.testing.assert_allclose(jit(block)(mixer, g.hidden(index)), g.hidden(index + 1), atol=5e-5, rtol=5e-5)


def slopes(heads, index, count, **options):
    place = {"layer_index": index, "layer_count": count}
    return np.asarray(LightningAttention(4, heads=heads, head_dim=2, **place, **options, rngs=nnx.Rngs(0)).slopes[...])


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    assert alibi_slopes(1) == [2.0**-8]
    first, middle, last = (slopes(64, index, 80) for index in (0, 40, 79))
    np.testing.assert_allclose([first[0], first[63], middle[0]], [0.917013, 0.00390629, 0.452707], rtol=1e-6)
    np.testing.assert_allclose(middle / alibi_slopes(64), 0.493681, rtol=1e-6)
    np.testing.assert_allclose(last / alibi_slopes(64), 1e-5, rtol=2e-2)
    np.testing.assert_allclose(slopes(6, 3, 8, layer_slopes=False), alibi_slopes(6))


def test_retention_decays():
    gamma = np.exp(np.asarray(retention_decay(4), np.float64))
    np.testing.assert_allclose(gamma, 1 - 2.0 ** -np.arange(5, 9), rtol=1e-6)


def test_pair_rotation():
    x, positions = random("pairs", 2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 0, 0, 100, 9]])
    angle = positions[:, :, None, None] * 10_000.0 ** -np.linspace(0, 1, 4)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    agree(np.stack([turned.real, turned.imag], -1).reshape(x.shape), pair_rotation(x, positions), limit=1e-6)


def test_rescalings_of_the_parallel_form_cancel_in_the_norm():
    """The authors divide rows of D by the root of their sums, then rows of scores by the size of their sums."""
    module, x = layer("retention"), inputs(70)
    heads, width = module.heads, module.value_dim
    shape = (*x.shape[:2], heads, -1)
    positions = np.tile(np.arange(70), (2, 1))
    project = lambda name: np.asarray(x @ np.float64(getattr(module, name).kernel[...])).reshape(shape)  # noqa: E731
    q, k = (np.float64(pair_rotation(jnp.float32(project(name)), positions)) for name in ("q_proj", "k_proj"))
    distance = positions[0][:, None] - positions[0][None]
    gamma = 1 - 2.0 ** -np.arange(5, 5 + heads)
    decay = np.tril(gamma[:, None, None] ** np.maximum(distance, 0))
    decay /= np.sqrt(decay.sum(-1, keepdims=True))
    scores = np.einsum("bihk,bjhk->bhij", q, k * module.key_dim**-0.5) * decay
    scores /= np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1)
    o = np.einsum("bhij,bjhv->bihv", scores, project("v_proj"))
    o /= np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-12)
    gate = project("gate_proj").reshape(*x.shape[:2], heads * width)
    y = (gate / (1 + np.exp(-gate)) * o.reshape(gate.shape)) @ np.float64(module.out_proj.kernel[...])
    agree(y, forward(module, x), limit=1e-4)  # eps of the norm is not rescaled


def test_positions_in_documents():
    ids = np.array([[0, 0, 1, 1, 1, -1], [-1, -1, 4, 4, -1, 4], [-1] * 6, [2, 3, 4, 4, 5, 5]])
    positions, following = document_positions(ids.shape, jnp.array([5, 5, 5, 5]), ids)
    real = ids >= 0
    want = np.array([[5, 6, 0, 1, 2, 0], [0, 0, 5, 6, 0, 7], [0] * 6, [5, 0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(np.where(real, positions, 0), want)
    np.testing.assert_array_equal(following, [3, 8, 5, 2])
    np.testing.assert_array_equal(document_positions((2, 3), jnp.array([4, 0]), None)[0], [[4, 5, 6], [0, 1, 2]])
    given = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(document_positions(ids.shape, None, ids, given)[1], [5, 12, 0, 24])


@pytest.mark.parametrize("name", ["retention", "linear_attention_cosformer", "lightning_rope"])
def test_only_differences_of_positions_matter(name):
    x, positions = inputs(20), np.tile(np.arange(20), (2, 1))
    call = jit(lambda module, x, positions: module(x, positions=positions)[0])
    want = np.asarray(forward(layer(name), x))
    agree(want, call(layer(name), x, positions + 7))
    assert np.abs(want - call(layer(name), x, 2 * positions)).max() > 1e-2


def test_retention_starts_as_its_authors_do():
    """Xavier, uniform, with gains 2^-2.5 into the memory and 2^-1 out of it."""
    module = MultiScaleRetention(64, heads=4, rngs=nnx.Rngs(0))
    for projection, gain in ((module.q_proj, 2**-2.5), (module.v_proj, 2**-2.5), (module.out_proj, 0.5)):
        bound = gain * np.sqrt(6 / sum(projection.kernel.shape))
        assert 0.95 * bound < np.abs(projection.kernel[...]).max() <= bound


def test_hedgehog_starts_from_the_identity():
    module = LinearAttention(DIM, heads=2, feature_map="hedgehog", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.phi.weight[...], np.tile(np.eye(8), (2, 1, 1)))
    assert module.phi.features == 16


def test_fast_weight_golden():
    """One head; identity for the projections that the golden does not have, and beta by its logarithm."""
    v = np.concatenate([det(3, (8, 3)), np.zeros((8, 1))], axis=1)
    beta = 0.5 + 0.4 * det(6, (8,))
    x = np.concatenate([det(1, (8, 4)), det(2, (8, 4)), v, np.log(beta / (1 - beta))[:, None]], axis=1)[None]
    make = lambda: FastWeight(13, heads=1, head_dim=4, nu=2, rngs=nnx.Rngs(0))  # noqa: E731
    take = lambda start, size: np.eye(13, dtype=np.float32)[:, start : start + size]  # noqa: E731
    weights = {"q_proj.kernel": take(0, 4), "k_proj.kernel": take(4, 4), "v_proj.kernel": take(8, 4)}
    weights |= {"beta_proj.kernel": take(12, 1), "out_proj.kernel": take(0, 4).T}
    y = np.asarray(forward(load(make, weights), x.astype(np.float32)))[0]
    np.testing.assert_allclose(y.sum(), -0.021015, atol=5e-6)
    np.testing.assert_allclose(y[-1, :3], [-0.029862, -0.013239, 0.008160], atol=1e-6)


def test_redraw_changes_the_random_vectors_only():
    module, x = layer("performer"), inputs(20)
    want = np.asarray(forward(module, x))
    other = jit(redraw)(module, jax.random.key(3))
    assert np.abs(forward(other, x) - want).max() > 1e-3
    np.testing.assert_array_equal(forward(module, x), want)
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(module)), nnx.to_flat_state(nnx.state(other)), strict=True
    ):
        assert (path == ("omega",)) != np.array_equal(a[...], b[...]), path


def test_redraw_reaches_stacked_performers():
    """Each layer of a model draws its own."""
    sizes = {"vocab_size": 8, "dim": 8, "mlp_dim": 8, "pattern": ("performer",), "repeats": 3}
    model = LanguageModel(**sizes, mixers={"performer": {"heads": 2}}, rngs=nnx.Rngs(0))
    omegas = lambda model: [  # noqa: E731
        v[...] for path, v in nnx.to_flat_state(nnx.state(model)) if path[-1] == "omega"
    ]
    (before,), (after,) = omegas(model), omegas(redraw(model, jax.random.key(0)))
    assert before.shape == after.shape
    assert np.unique(np.asarray(after).round(5), axis=0).shape[0] == 3
    assert not np.isclose(before, after).any()


def test_attention_of_a_performer_nears_the_softmax():
    """With ever more features; long keys would need too many of them."""
    x, errors = 0.4 * inputs(40), []
    for features in (64, 4096):
        module = filled(lambda features=features: Performer(DIM, heads=2, features=features, rngs=nnx.Rngs(0)))
        q, k, v = (
            np.float64(x @ p.kernel[...]).reshape(2, 40, 2, 8) for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        s = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(8)
        p = np.tril(np.exp(s))
        o = np.einsum("bhij,bjhv->bihv", p / p.sum(-1, keepdims=True), v).reshape(2, 40, DIM)
        want = o @ np.float64(module.out_proj.kernel[...])
        errors.append(np.sqrt(np.mean((want - forward(module, x)) ** 2) / np.mean(want**2)))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 3


WRONG = {
    "heads": lambda rngs: LinearAttention(DIM, heads=3, rngs=rngs),
    "kv_heads": lambda rngs: LinearAttention(DIM, heads=4, kv_heads=3, rngs=rngs),
    "feature_map": lambda rngs: LinearAttention(DIM, feature_map="softmax", rngs=rngs),
    "max_length": lambda rngs: LinearAttention(DIM, feature_map="cosformer", rngs=rngs),
    "nu": lambda rngs: LinearAttention(DIM, feature_map="dpfp", nu=0, rngs=rngs),
    "kernel": lambda rngs: Performer(DIM, kernel="cosine", rngs=rngs),
    "features": lambda rngs: Performer(DIM, features=0, rngs=rngs),
    "update": lambda rngs: FastWeight(DIM, update="replace", rngs=rngs),
    "rotation": lambda rngs: MultiScaleRetention(DIM, rotation="xpos", rngs=rngs),
    "key_dim": lambda rngs: MultiScaleRetention(DIM, heads=1, key_dim=3, rngs=rngs),
    "head_dim": lambda rngs: LightningAttention(DIM, heads=1, head_dim=3, rope_theta=1e4, rngs=rngs),
}


@pytest.mark.parametrize("argument", WRONG)
def test_options(argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+") as error:
        nnx.eval_shape(lambda: WRONG[argument](nnx.Rngs(0)))
    assert "\n" not in str(error.value)
