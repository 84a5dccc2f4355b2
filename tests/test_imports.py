"""Imports point one way: experiments -> training, models -> layers -> linear, sparse -> pallas_kernels."""

import sys
from pathlib import Path

import pytest

from tests.imports import owner_of, rule, violations

ROOT = Path(__file__).parents[1]
STANDARD = frozenset(sys.stdlib_module_names)

LEAVES = (
    "effattn_jax.typing",
    "effattn_jax.dispatch",
    "effattn_jax.checks",
    "effattn_jax.precision",
    "effattn_jax.kernels",
)
MECHANISMS = ("effattn_jax.linear", "effattn_jax.sparse")
EVERYTHING_BELOW = (
    *LEAVES,
    *MECHANISMS,
    "effattn_jax.layers",
    "effattn_jax.distributed",
    "effattn_jax.models",
    "effattn_jax.pretrained",
    "effattn_jax.training",
)
RULES = {
    "effattn_jax.typing": rule(installed=["jaxtyping"]),
    "effattn_jax.dispatch": rule(installed=["jax", "numpy"]),
    "effattn_jax.checks": rule(installed=["jax", "numpy"]),
    "effattn_jax.precision": rule("effattn_jax.typing", installed=["jax"]),
    "effattn_jax.kernels": rule("effattn_jax.dispatch", installed=["jax"]),
    "pallas_kernels": rule(never=["flax"]),
    "effattn_jax.linear": rule(*LEAVES, "pallas_kernels", never=["flax"]),
    "effattn_jax.sparse": rule(*LEAVES, "pallas_kernels", never=["flax"]),
    "effattn_jax.layers": rule(*LEAVES, *MECHANISMS, "effattn_jax.distributed"),
    "effattn_jax.models": rule(*LEAVES, *MECHANISMS, "effattn_jax.layers", "effattn_jax.distributed"),
    "effattn_jax.pretrained": rule(*LEAVES, *MECHANISMS, "effattn_jax.layers", "effattn_jax.models"),
    "effattn_jax.training": rule(*EVERYTHING_BELOW),
    "effattn_jax.distributed": rule(*EVERYTHING_BELOW),  # context parallelism below, the planner above
    "effattn_jax": rule(*EVERYTHING_BELOW),
    "configs": rule(*EVERYTHING_BELOW),
    "experiments": rule(*EVERYTHING_BELOW, "configs", "effattn_jax", "pallas_kernels"),
}


def test_the_project_follows_its_rules():
    assert violations(ROOT, RULES, STANDARD) == []


def test_every_part_of_the_package_has_a_rule_of_its_own():
    parts = [p.stem for p in (ROOT / "effattn_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    names = {f"effattn_jax.{part}" for part in parts if part != "__init__"}
    assert {name for name in names if owner_of(name, RULES) != name} == set()


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("pallas_kernels/ssd.py", "import flax.nnx", "flax.nnx"),
        ("pallas_kernels/ssd.py", "from effattn_jax.linear import chunks", "effattn_jax.linear.chunks"),
        ("pallas_kernels/deep/ssd.py", "import effattn_jax", "effattn_jax"),
        ("effattn_jax/layers/gla.py", "from effattn_jax import models", "effattn_jax.models"),
        ("effattn_jax/layers/gla.py", "from ..models.block import Block", "effattn_jax.models.block.Block"),
        ("effattn_jax/layers/gla.py", "from effattn_jax.training import step", "effattn_jax.training.step"),
        ("effattn_jax/linear/__init__.py", "from ..sparse import mask", "effattn_jax.sparse.mask"),
        ("effattn_jax/linear/gla.py", "def f():\n    from flax import nnx", "flax.nnx"),
        ("effattn_jax/sparse/mask.py", "from effattn_jax.linear.chunks import f", "effattn_jax.linear.chunks.f"),
        ("effattn_jax/sparse/mask.py", "if True:\n    import effattn_jax.layers as l", "effattn_jax.layers"),
        ("effattn_jax/models/block.py", "from effattn_jax.training.step import f", "effattn_jax.training.step.f"),
        ("effattn_jax/training/loop.py", "from experiments.train import main", "experiments.train.main"),
        ("effattn_jax/checks.py", "from .typing import Array", "effattn_jax.typing.Array"),
        ("effattn_jax/checks.py", "import flax", "flax"),
        ("effattn_jax/typing.py", "import jax", "jax"),
        ("effattn_jax/dispatch.py", "from . import checks", "effattn_jax.checks"),
        ("configs/a.py", "import experiments", "experiments"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, path, source, imported):
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert _check(tmp_path, {path: source}) == [f"{module} imports {imported}"]


def test_allowed_imports_pass(tmp_path):
    files = {
        "pallas_kernels/ssd.py": "import jax.numpy as jnp\nfrom . import tiles",
        "effattn_jax/typing.py": "from jaxtyping import Array",
        "effattn_jax/checks.py": "import numpy as np\nimport math\nimport jax",
        "effattn_jax/linear/gla.py": "from effattn_jax import checks\nfrom .chunks import f\nimport pallas_kernels.ssd",
        "effattn_jax/layers/gla.py": "from flax import nnx\nfrom effattn_jax.linear import gla",
        "effattn_jax/training/loop.py": "import effattn_jax.models\nimport optax",
        "experiments/train.py": "from effattn_jax.training import loop\nfrom configs import base\nimport effattn_jax",
    }
    assert _check(tmp_path, files) == []


def test_a_module_without_a_rule_is_found(tmp_path):
    rules = {"effattn_jax.linear": rule()}
    assert _check(tmp_path, {"effattn_jax/stray.py": ""}, rules) == ["effattn_jax.stray: no rule"]


def _check(root, files, rules=RULES):
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return violations(root, rules, STANDARD)
