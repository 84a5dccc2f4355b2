"""Which of the combinations of engines and forms are run, and when."""

import pytest

ALWAYS = ("test_forms_agree_over_strengths", "test_forms_agree_on_packed_documents")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """An engine has its own forms. The associative form shares all but its scan with the chunkwise one: most checks of
    it are slow."""
    kept = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        engine, form = parameters.get("engine"), parameters.get("form")
        if engine is not None and isinstance(form, str) and form not in engine.forms:
            continue
        if engine is not None and form == "associative" and item.originalname not in ALWAYS:
            item.add_marker(pytest.mark.slow)
        kept.append(item)
    items[:] = kept
