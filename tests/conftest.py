"""Eight emulated CPU devices for every test: what a mesh does can be proved without an accelerator."""

import gc
import os
from collections import defaultdict

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# A program runs for a millisecond and compiles for a second; the environment is for processes that tests start.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`quick_cases(n)`: each case takes seconds to compile; n are quick, of the chunkwise form first, others slow."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick_cases"):
            cases[item.path, item.originalname].append(item)
    for same in cases.values():
        first = sorted(same, key=lambda item: (_is_slow(item), "chunkwise" not in item.name))
        for item in first[same[0].get_closest_marker("quick_cases").args[0] :]:
            item.add_marker(pytest.mark.slow)


def _is_slow(item):
    return item.get_closest_marker("slow") is not None


def _programs(item):
    """What shares compiled programs with the item: tests of its engine or layer, or of its file; runs share theirs."""
    group = item.get_closest_marker("xdist_group")
    if group:
        return group.args[0]
    return item.path.parent if item.path.parent.name == "training" else item.path


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Every program holds memory maps, of which a process may have 65,530: a suite of thousands must let them go."""
    if nextitem is not None and _programs(item) != _programs(nextitem):
        jax.clear_caches()
        gc.collect()
