"""Tests of one layer run in one process, which compiles its programs once."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and item.path.parent.name == "layers":
            item.add_marker(pytest.mark.xdist_group(name))
