"""Sparse quality: rows are what the task says, keys are counted, a full budget is dense, and the experiment runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sparse_quality import get_config
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.sparse.decoders import Dense, Quest
from effattn_jax.sparse.prefills import PREFILLS
from effattn_jax.training.setup import model_maker
from experiments import sparse_evaluation, sparse_quality, sparse_training
from experiments.sparse_count import share_of_decoder, share_of_lists, share_of_prefill
from experiments.sparse_evaluation import DECODE, DENSE, PREFILL, case_of, held_out, quality, settings
from experiments.sparse_methods import Sizes, decode_options, prefill_options, random_lists
from experiments.sparse_needles import Task, draw_rows
from experiments.sparse_training import Trained, trained
from tests.compiled import jit

SIZES = Sizes(keys=64, block=8, page=4)
TEXT = np.where(np.arange(4000) % 17, np.random.default_rng(0).integers(32, 64, 4000), 10).astype(np.int32)


def tiny():
    config = get_config()
    config.model.dim, config.model.mlp_dim, config.model.repeats = 32, 32, 2
    config.stages = ((40, 2, 2, 2, 2), (64, 2, 3, 2, 2))
    config.optimizer.warmup_steps = 1
    config.test = {"length": 64, "decoded": 8, "needles": 3, "text_rows": 3, "needle_rows": 4, "batch": 4}
    config.sweep = {"shares": (0.25, 1.0), "block": SIZES.block, "page": SIZES.page}
    return config


@pytest.fixture(scope="module")
def synthetic():
    with pytest.MonkeyPatch.context() as patch:
        for module in (sparse_training, sparse_evaluation):
            patch.setattr(module, "text", lambda config, split: TEXT)
        yield


@pytest.fixture(scope="module")
def case(synthetic):
    config = tiny()
    make = model_maker(config, 258)
    untrained = Trained(blueprint(make), jax.jit(lambda: parameters_of(make()))(), 0, None)
    return case_of(config, untrained, held_out(config))


@pytest.fixture(scope="module")
def dense(case):
    return {phase: quality(case, phase, DENSE, {}) for phase in (PREFILL, DECODE)}


@pytest.mark.parametrize("task", [Task(65, 3), Task(120, 6, 7)], ids=["one question", "many"])
def test_answers_are_the_values_of_the_needles(task):
    """Read back by a dictionary."""
    for row, random, answer, depth in zip(*draw_rows(np.random.default_rng(1), TEXT, 8, task), strict=True):
        line = bytes(row.astype(np.uint8)).decode()
        assert len(row) == task.length
        known, asked = {}, 0
        for place in np.flatnonzero(row == ord("#")):
            if line[place : place + 2] != "# " or not line[place + 2 : place + 3].isupper():
                continue  # text
            key, value = line[place + 2], line[place + 3]
            assert random[place + 2]
            assert answer[place + 3] == (key in known)
            assert random[place + 3] == (key not in known)
            asked += key in known
            _, known_value = known.setdefault(key, (place, value))
            assert value == known_value
        assert (len(known), asked) == (task.needles, task.questions)
        assert answer[-1]
        assert depth == pytest.approx(known[line[-2]][0] / task.length)
        assert (random | answer).sum() == 2 * (task.needles + task.questions)


def test_lists_are_counted_by_their_pairs():
    """By a loop over queries and keys; twice in the list of another row, never twice in one."""
    length, first, query_block, block_size = 21, 5, 4, 3
    rng = np.random.default_rng(0)
    chosen = rng.random((2, 4, 3, 7)) < 0.4
    lists = np.where(chosen, np.arange(7), -1)
    got = share_of_lists(jnp.asarray(lists), first=first, length=length, query_block=query_block, block_size=block_size)
    read = there = 0
    for p in range(first, length):
        for s in range(p + 1):
            there += chosen.shape[0] * chosen.shape[2]
            read += chosen[:, (p - first) // query_block, :, s // block_size].sum()
    assert float(got) == pytest.approx(read / there, rel=1e-5)


@pytest.mark.parametrize("name", PREFILLS)
@pytest.mark.quick_cases(1)
def test_prefill_is_counted_as_it_reads(name):
    """The values are unit vectors, so that outputs hold the weights."""
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.standard_normal((2, 64, heads, 16)), jnp.float32) for heads in (4, 2))
    options = prefill_options(0.25, SIZES)[name]
    v = jnp.broadcast_to(jnp.eye(64)[None, :, None], (2, 64, 2, 64))
    rotate = {"rotate": lambda x, positions: x} if name == "streaming" else {}
    count, weights = jit(
        lambda q, k: (
            share_of_prefill(name, options, q, k, None),
            PREFILLS[name](q, k, v, scale=None, **rotate, **options),
        )
    )(q, k)
    assert 0.05 < float(count) < 0.9
    assert float(count) == pytest.approx(np.mean(np.asarray(weights) > 0) * 64 * 2 / 65, rel=1e-5)


def test_decoding_is_counted():
    rng = np.random.default_rng(4)
    q, k = (jnp.asarray(rng.standard_normal((1, 40, heads, 16)), jnp.float32) for heads in (4, 2))
    counted = lambda decoder: float(jit(lambda q, k: share_of_decoder(decoder, q, k, 30))(q, k))  # noqa: E731
    assert counted(Dense()) == 1
    # 3 pages of 4: two of them full, and the last one with p mod 4 + 1 tokens
    want = sum(9 + p % 4 for p in range(30, 40)) / sum(range(31, 41))
    assert counted(Quest(budget=12, page_size=4)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_random_choice_reads_its_budget(share):
    """Of 64 blocks; the own one alone is 1 / 32 of the causal pairs of blocks."""
    q = jnp.asarray(np.random.default_rng(5).standard_normal((4, 512, 8, 4)), jnp.float32)
    lists = np.asarray(jit(lambda q: random_lists(q, 64, jnp.arange(64), share))(q))
    assert all((lists[:, i] == i).any(-1).all() for i in range(64))
    assert lists.max(axis=(0, 2, 3)).tolist() == list(range(64))
    read = float(share_of_lists(jnp.asarray(lists), length=512, query_block=8, block_size=8))
    assert read == pytest.approx(share, abs=0.02)
    assert share == 1 or len({tuple(row) for row in lists[:, 60].reshape(32, -1)}) == 32


ALL = [(DECODE, name) for name in decode_options(1.0, SIZES)] + [
    (PREFILL, name) for name in prefill_options(1.0, SIZES)
]
QUICK = [(DECODE, "quest"), (PREFILL, "xattention")]
FULL = QUICK + [each for each in ALL if each not in QUICK]


@pytest.mark.parametrize(("phase", "name"), FULL)
@pytest.mark.slow
def test_a_full_budget_is_dense(case, dense, phase, name):
    options = (prefill_options if phase == PREFILL else decode_options)(1.0, SIZES)[name]
    got, dense = quality(case, phase, name, options), dense[phase]
    assert dense.read == 1
    assert got.read == pytest.approx(1, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(dense.bits_per_byte, rel=1e-5)
    assert got.recall == dense.recall


def test_settings_are_all_methods_at_all_budgets():
    every = settings((0.25, 0.5), SIZES)
    assert len(every) == 2 + 2 * len(FULL)
    assert len({(phase, method, share) for phase, method, share, _ in every}) == len(every)


@pytest.mark.slow
def test_the_experiment_runs(synthetic, monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_quality, "get_config", lambda size: tiny())
    monkeypatch.setattr("sys.argv", ["sparse_quality", f"--output={tmp_path}", "--method=quest", "--method=xattention"])
    sparse_quality.main()
    report = json.loads((tmp_path / "sparse_quality.json").read_text())
    assert [(row["phase"], row["method"], row["budget"]) for row in report["rows"]] == [
        ("prefill", "dense", 1.0),
        ("decode", "dense", 1.0),
        ("prefill", "xattention", 0.25),
        ("prefill", "xattention", 1.0),
        ("decode", "quest", 0.25),
        ("decode", "quest", 1.0),
    ]
    assert report["rows"][4]["read"] < 0.3
    assert report["rows"][4]["side"] == 0.5
    assert (tmp_path / "sparse_quality.png").stat().st_size > 1000
    again = trained(tiny(), str(tmp_path))  # reads what was trained
    assert (again.steps, again.seconds) == (4, None)
