"""Eight emulated CPU devices for every test: what a mesh does can be proved without an accelerator."""

import gc

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


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
