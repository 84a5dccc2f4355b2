"""Which tests of a layer are run, and where."""

import pytest

from tests.layers.catalogue import RECORDS

ONCE = {  # of a layer: another layout of it passes or fails with the first
    "test_any_split_is_one_pass",
    "test_packed_row_in_pieces_is_one_pass",
    "test_tokens_without_ids_are_document_0",
    "test_right_padding_changes_nothing",
    "test_vmap_over_inputs_and_states",
    "test_parameters_name_their_axes",
    "test_a_pass_changes_nothing_in_the_module",
}
WHOLE = {"mamba2_groups", "attention_window_sinks", "gated_delta_net"}  # these go quickly through everything


def is_quick(item, name):
    """One check of each kind; lengths, splits and dtypes beyond it are slow."""
    test, parameters = item.originalname, item.callspec.params
    if test == "test_prefill_then_decoding_is_one_pass":
        return parameters["length"] == 3
    if test == "test_packed_row_in_pieces_is_one_pass":
        return parameters["sizes"] == (4,) * 6
    if test == "test_padding_at_either_end_leaves_the_state":
        return parameters["packed"]
    return test not in (
        "test_bfloat16_follows_float32",
        "test_gradient_is_the_slope",
        "test_vmap_over_inputs_and_states",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    kept = []
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and name in RECORDS and item.path.parent.name == "layers":
            if RECORDS[name].slow and item.originalname in ONCE:
                continue
            if name not in WHOLE and not is_quick(item, name):
                item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group(name))  # one process compiles its programs
        kept.append(item)
    items[:] = kept
