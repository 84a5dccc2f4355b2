"""The engines under test. A new one adds a file to records/ and a line here; test_contract.py does the rest.

Kernels are engines of their own (implementations.py): they go through the same checks.
"""

import pytest

from tests.linear import implementations
from tests.linear.records import (
    delta_rule,
    diagonal_scan,
    dplr,
    gated_slot_attention,
    log_linear,
    mamba3,
    mesa,
    rwkv4,
    scalar_decay,
    selective_scan,
    titans_memory,
    ttt,
    vector_decay,
)

ENGINES = [
    *delta_rule.RECORDS,
    *diagonal_scan.RECORDS,
    *dplr.RECORDS,
    *gated_slot_attention.RECORDS,
    *log_linear.RECORDS,
    *mamba3.RECORDS,
    *mesa.RECORDS,
    *rwkv4.RECORDS,
    *scalar_decay.RECORDS,
    *selective_scan.RECORDS,
    *titans_memory.RECORDS,
    *ttt.RECORDS,
    *vector_decay.RECORDS,
    *implementations.RECORDS,
]

every_engine = pytest.mark.parametrize(
    "engine",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.variant else []) for e in ENGINES],
)
every_map = pytest.mark.parametrize(
    "engine",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.variant else []) for e in ENGINES if e.map is not None],
)
every_kernel = pytest.mark.parametrize("engine", [pytest.param(e, id=e.name) for e in ENGINES if e.of is not None])
every_form = pytest.mark.parametrize("form", ["recurrent", "parallel", "chunkwise", "associative"])
every_other_form = pytest.mark.parametrize("form", ["parallel", "chunkwise", "associative"])
