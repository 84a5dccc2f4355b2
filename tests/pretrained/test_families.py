"""Every family of published models: logits, greedy continuations, cached decoding, and what is written back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.models import generate
from effattn_jax.pretrained import load, save
from tests.compiled import jit
from tests.pretrained.fixture import fixture, header, raw

TOLERANCE = 1e-4  # absolute, of logits with a deviation of about 1.5
DECAYS = r".*(slope_rate|_decay)"
MODELS = {
    "falcon_mamba": {},
    "fla_comba": {"slow": True},
    "fla_delta_net": {"slow": True},
    "fla_delta_net_gate_neg": {"slow": True},
    "fla_forgetting_transformer": {"slow": True},
    "fla_gated_deltanet": {"slow": True},
    "fla_gated_deltanet_gva": {"slow": True},
    "fla_gated_deltaproduct": {"slow": True},
    "fla_gla": {"slow": True},
    "fla_gla_gqa_conv": {},
    "fla_gsa": {"slow": True},
    "fla_hgrn": {"slow": True},
    "fla_hgrn2": {"slow": True},
    "fla_kda": {"slow": True},
    "fla_linear_attn": {"slow": True},
    "fla_nsa": {},
    "fla_path_attn": {"long_tolerance": 1e-3, "slow": True},
    "fla_retnet": {"slow": True},
    "fla_rwkv6": {"slow": True},
    "fla_rwkv7": {"slow": True},
    "gemma3_text": {},
    "gpt_oss": {},
    "jamba": {"slow": True},
    "kimi_linear": {},
    "mamba": {},
    "mamba2_codestral": {},
    "minicpm3": {},
    "minicpm4_dense": {},
    "minicpm4_longrope": {},
    "minimax_text01": {"computed": DECAYS},
    "minimax_text01_rotary_half": {"computed": DECAYS, "slow": True},
    "mistral_swa": {},
    "qwen3_next": {},
    "recurrent_gemma": {},
    "recurrentgemma_official": {"slow": True},
    "rwkv4": {},
    "rwkv5": {"slow": True},
    "rwkv6": {"slow": True},
    "rwkv7": {},
    "ttt_linear": {"slow": True},
    "ttt_linear_mamba_backbone": {},
    "ttt_mlp": {"slow": True},
    "ttt_mlp_mamba_backbone": {"slow": True},
}
"""Fixtures, with what is known to differ: `tolerance`, `dropped`, tensors of the file that hold nothing, and
`computed`, a pattern of tensors that follow from the config and are written to rounding; `long_tolerance`, of long rows
from token 64 on, where the public kernel rounds what it carries between blocks; `slow`, where a relative is quick."""

LONG = [name for name in MODELS if name.startswith("fla_")]
CASES = [pytest.param(n, marks=[pytest.mark.slow] if known.get("slow") else []) for n, known in MODELS.items()]


@pytest.fixture(scope="module", params=CASES, ids=str)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return load(fixture(name).path)


def forward(model, ids, **options):
    return jit(lambda model, ids, options: model(ids, **options)[0])(model, jnp.asarray(ids), options)


def tolerance(name):
    return MODELS[name].get("tolerance", TOLERANCE)


def test_logits(name, model):
    io = fixture(name).io
    np.testing.assert_allclose(forward(model, io["input_ids"]), io["logits"], atol=tolerance(name), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG, indirect=True)
def test_logits_of_a_long_row(name, model):
    """83 tokens: other kernels of the public implementation."""
    io = fixture(name).io
    got, want = forward(model, io["long_ids"]), io["long_logits"]
    np.testing.assert_allclose(got[:, :64], want[:, :64], atol=tolerance(name), rtol=0)
    atol = MODELS[name].get("long_tolerance", tolerance(name))
    np.testing.assert_allclose(got[:, 64:], want[:, 64:], atol=atol, rtol=0)


@pytest.mark.quick_cases(2)
def test_greedy_continuation(name, model):
    io = fixture(name).io
    ids = io["input_ids"]
    new = generate(model, ids, max_new_tokens=io["gen_ids"].shape[1] if "gen_ids" in io else 8, temperature=0.0)
    np.testing.assert_array_equal(new, io["gen_ids"] if "gen_ids" in io else likeliest(model, ids, new))


def likeliest(model, ids, new):
    """Where no continuation is published: for each new token the likeliest one by a full pass over what is before."""
    return np.argmax(forward(model, np.concatenate([ids, new], 1))[:, ids.shape[1] - 1 : -1], axis=-1)


@pytest.mark.slow
def test_cached_decoding_is_the_full_pass(name, model):
    """A prompt of 20 tokens in one go, the rest one by one."""
    ids = jnp.asarray(fixture(name).io["input_ids"])
    step = jit(lambda model, ids, state: model(ids, state))
    state, parts = model.init_state(*ids.shape), []
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, ids.shape[1]))]:
        logits, state = step(model, ids[:, start:end], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), forward(model, ids), atol=tolerance(name), rtol=0)


@pytest.mark.slow
def test_left_padded_rows(name, model):
    """Against the published padded logits, or where there are none the row by itself."""
    io = fixture(name).io
    ids = io["input_ids"][:1]
    padded = np.pad(ids, ((0, 0), (9, 0)))
    segment_ids = np.where(np.arange(padded.shape[1]) < 9, -1, 0)[None]
    positions = np.arange(padded.shape[1])[None] - 9
    got = forward(model, padded, segment_ids=jnp.asarray(segment_ids), positions=jnp.asarray(positions))
    np.testing.assert_allclose(got[:, 9:], io["logits"][:1], atol=tolerance(name), rtol=0)


@pytest.mark.quick_cases(3)
def test_what_is_saved_is_what_was_read(name, model, tmp_path):
    given = fixture(name)
    save(model, tmp_path / "out")
    dropped = set(MODELS[name].get("dropped", ()))
    assert header(tmp_path / "out") == {k: v for k, v in given.tensors.items() if k not in dropped}
    before, after = raw(given.path), raw(tmp_path / "out")
    computed = re.compile(MODELS[name].get("computed", "$"))
    for key in after:
        if not computed.fullmatch(key):
            assert after[key] == before[key], key
        else:
            np.testing.assert_allclose(*(np.frombuffer(x[key], np.float32) for x in (after, before)), rtol=1e-5)
    again = load(tmp_path / "out")
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
