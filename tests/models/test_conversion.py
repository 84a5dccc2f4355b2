"""Other mixers in a trained model: what changes, and which weights stay."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.models.conversion import block_names, blocks_of, pattern_of, reuse, with_mixer
from tests.compiled import jit

DIM, HEADS, GROUPS, HEAD_DIM = 16, 4, 2, 4
OPTIONS = {
    "vocab_size": 11,
    "dim": DIM,
    "mlp_dim": 24,
    "pattern": ("attention",),
    "repeats": 4,
    "mixers": {"attention": {"heads": HEADS, "kv_heads": GROUPS, "mlp_dim": 20}},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9)))


def build(options, seed):
    return LanguageModel(**options, rngs=nnx.Rngs(seed))


def both(mixer, replaced, **options):
    changed = with_mixer(OPTIONS, mixer, replaced)
    teacher, fresh = parameters_of(build(OPTIONS, 0)), parameters_of(build(changed, 1))
    student, taken = reuse(teacher, pattern_of(OPTIONS), fresh, pattern_of(changed), head_dim=HEAD_DIM, **options)
    return changed, teacher, fresh, student, taken


def test_blocks_and_options():
    changed = with_mixer(OPTIONS, "gated_delta_net", [0, 1, 2])
    new = "attention as gated_delta_net"
    assert block_names(changed) == (new, new, new, "attention")
    assert changed["mixers"][new] == {
        "kind": "gated_delta_net", "mlp_dim": 20, "heads": HEADS, "head_dim": HEAD_DIM, "expand_v": 1.0
    }  # fmt: skip
    assert OPTIONS["mixers"].keys() == {"attention"}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_delta_net", "gla"])
def test_weights_are_the_teachers(mixer):
    changed, teacher, fresh, student, taken = both(mixer, [0, 2])
    pattern = pattern_of(changed)
    for block in range(4):
        below, at = pattern.place(block)
        old = lambda name, block=block: np.asarray(teacher[f"units.blocks.0.{name}"][block])  # noqa: E731
        own = lambda name, below=below, at=at: np.asarray(student[f"{below}.{name}"][at])  # noqa: E731
        for name in ("norm.scale", "mlp.up.kernel", "mlp.down.kernel", "mixer.out_proj.kernel"):
            np.testing.assert_array_equal(own(name), old(name))
        here = "qkv." if mixer == "gated_delta_net" and block in (0, 2) else ""
        np.testing.assert_array_equal(own(f"mixer.{here}q_proj.kernel"), old("mixer.q_proj.kernel"))
        if here:  # a key head for each query head: each of the teacher's twice
            k = old("mixer.k_proj.kernel").reshape(DIM, GROUPS, 1, HEAD_DIM)
            want = np.broadcast_to(k, (DIM, GROUPS, HEADS // GROUPS, HEAD_DIM)).reshape(DIM, -1)
            np.testing.assert_array_equal(own(f"mixer.{here}k_proj.kernel"), want)
    np.testing.assert_array_equal(student["embedding"], teacher["embedding"])
    gates = [name for name in student if "mixer.b_proj" in name or "mixer.decay_proj" in name]
    assert gates
    assert all(taken[name] == 0 and bool(jnp.all(student[name] == fresh[name])) for name in gates)
    assert 0 < sum(taken.values()) < sum(x.size for x in student.values())


def test_new_mixers_take_nothing():
    changed, teacher, fresh, student, _ = both("gated_delta_net", [0, 2], new=[0, 2])
    below, at = pattern_of(changed).place(2)
    for name in student:
        if name.startswith(f"{below}.mixer."):
            np.testing.assert_array_equal(student[name][at], fresh[name][at])
    np.testing.assert_array_equal(
        student[f"{below}.norm.scale"], np.asarray(teacher["units.blocks.0.norm.scale"])[[0, 2]]
    )


def test_nothing_replaced_by_itself_is_the_teacher():
    """Attention in the place of attention: the same model."""
    changed, teacher, _, student, taken = both("attention", [1])
    plan = blueprint(lambda: build(changed, 1))
    logits = lambda model: jit(lambda model: model(TOKENS)[0])(model)  # noqa: E731
    want = logits(blueprint(lambda: build(OPTIONS, 0)).model(teacher))
    np.testing.assert_allclose(logits(plan.model(student)), want, atol=1e-5)
    assert sum(taken.values()) == sum(x.size for x in student.values())


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "hgrn2"])
def test_blocks_one_by_one_are_the_model(mixer):
    model = build(with_mixer(OPTIONS, mixer, [0, 3]), 0)

    def one_by_one(model):
        x = model.embed(TOKENS)
        for block in blocks_of(model):
            x, _ = block(x)
        return model.final_norm(x)

    np.testing.assert_allclose(jit(one_by_one)(model), jit(lambda model: model.hidden(TOKENS)[0])(model), atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "replaced", "message"), [("gla", [4], "replaced"), ("gla", [], "replaced"), ("x", [0], "mixer")]
)
def test_errors(mixer, replaced, message):
    with pytest.raises(ValueError, match=f"^{message}: got"):
        with_mixer(OPTIONS, mixer, replaced)
