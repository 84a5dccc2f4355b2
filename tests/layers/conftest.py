"""Which tests of a layer are run, and where."""

import jax.numpy as jnp
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
WHOLE = {"attention_window_sinks", "gated_delta_net"}  # these go quickly through everything


QUICK = {  # a check of each kind; what is not here is slow
    "test_prefill_then_decoding_is_one_pass": {"length": 3},
    "test_shapes_and_dtypes": {"dtype": jnp.float32},
    "test_parameters_name_their_axes": {},
}


RELATIVES = {  # of quick layers
    "attention_window",
    "comba",
    "delta_net",
    "fox_pro",
    "gated_delta_net2",
    "gated_delta_product",
    "gla_groups_conv",
    "mamba2_groups",
    "mamba_learned_norms",
    "rwkv6_channel_mix",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "ttt_mlp",
}


def is_quick(item):
    wanted = QUICK.get(item.originalname)
    if item.callspec.params["name"] in RELATIVES and item.originalname == "test_prefill_then_decoding_is_one_pass":
        return False
    return wanted is not None and all(item.callspec.params[name] == value for name, value in wanted.items())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    kept = []
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and name in RECORDS and item.path.parent.name == "layers":
            if RECORDS[name].slow and item.originalname in ONCE:
                continue
            if name not in WHOLE and not is_quick(item):
                item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group(name))  # one process compiles its programs
        kept.append(item)
    items[:] = kept
