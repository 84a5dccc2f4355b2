"""Which combinations of engines, forms and checks are run, and when.

A program takes seconds to compile and milliseconds to run. The quick tests of an engine share one program of its
chunkwise form, with documents, and a forward pass without; one engine, scalar decay, goes quickly through most checks.
"""

import pytest

from tests.linear.suite import Sizes

SHARED = {
    "test_forms_agree_over_strengths",
    "test_default_form",
    "test_bad_arguments",
    "test_forms_agree_on_packed_documents",
    "test_packed_documents_equal_separate_rows",
    "test_right_padding_changes_nothing",
    "test_no_gradient_reaches_later_tokens",
    "test_rows_and_heads_do_not_mix",
    "test_extreme_gates_stay_finite_in_packed_rows",
}
ANY_FORM = {"test_forms_agree_over_strengths", "test_default_form", "test_bad_arguments"}  # of scalar decay
ONE_FORM = {  # a program of their own: quickly for one form
    "test_splitting_equals_one_pass": "chunkwise",
    "test_float64_equals_numpy": "recurrent",  # the reference of the others
}
TRANSFORMED = {  # by JAX: a form that shares its code with another one behaves like it
    "test_jit_changes_nothing",
    "test_vmap_and_checkpoint",
    "test_second_derivative_equals_difference_of_gradients",
    "test_shard_map",
    "test_no_initial_state_is_zeros",
    "test_splitting_equals_one_pass",
    "test_bfloat16",
}
OTHER_FORMS = {  # than the one of kernels, or other numbers than theirs
    "test_chunk_sizes",
    "test_float64_equals_numpy",
    "test_second_derivative_equals_difference_of_gradients",
    "test_recurrent_keeps_no_state_per_token",
}
UNCOMPILED = {  # by kernels
    "test_default_form",
    "test_bad_arguments",
    "test_kernels_say_what_they_refuse",
    "test_kernels_refuse_second_derivatives",
}
FOLLOWS = {  # from agreeing with the recurrence; they have programs of their own
    "test_packed_documents_equal_separate_rows",
    "test_no_gradient_reaches_later_tokens",
    "test_rows_and_heads_do_not_mix",
    "test_right_padding_changes_nothing",
}
STRENGTH, LAST = "strong", 100  # gates and a last token that are quick
WHOLE = "scalar_decay"


def is_run(engine, form, test, parameters):
    """An engine has its own forms; other layouts of one, and forms that share code, skip what cannot differ."""
    if isinstance(form, str) and form not in engine.forms:
        return engine.of is not None and test == "test_default_form"
    if engine.of is not None:
        return is_of_kernels(engine, test, parameters)
    if test == "test_recurrent_keeps_no_state_per_token" and engine.output_is_state:
        return False
    if engine.name == WHOLE:
        return True
    shares_code = form in ("parallel", "associative")
    if engine.variant:
        return test in SHARED and not shares_code
    if test == "test_forms_agree_with_recurrent" and shares_code:
        return parameters["length"] in (0, 65)
    if test == "test_chunk_sizes":
        return parameters["chunk"] in (1, 16)
    if test == "test_shard_map":
        return None not in parameters["axes"] and not shares_code
    return not (test in TRANSFORMED and shares_code)


def is_of_kernels(engine, test, parameters):
    """What `refuses` lists fails for its reasons in a check of its own."""
    lengths = parameters.get("lengths", [parameters.get("length", 1)])
    dims = parameters.get("key_dim", 1), parameters.get("value_dim", 1)
    if not all(engine.takes(Sizes(length, *dims)) for length in lengths):
        return False
    return not (test in OTHER_FORMS or (test == "test_shard_map" and engine.is_interpreted))


def is_quick(engine, form, test, parameters):
    if engine.name == WHOLE:
        return form not in (*engine.slow_forms, "parallel") or test in ANY_FORM
    if engine.of is not None:
        return is_quick_of_kernels(engine, test, parameters)
    if engine.variant or test not in SHARED | ONE_FORM.keys():
        return False
    if test in FOLLOWS:
        return False
    if parameters.get("strength", STRENGTH) != STRENGTH or parameters.get("last", LAST) != LAST:
        return False
    if test == "test_forms_agree_over_strengths":
        return False  # their programs are others than those of documents
    if test in ONE_FORM:
        return ONE_FORM[test] == form
    return test == "test_bad_arguments" or form == "chunkwise"


def is_quick_of_kernels(engine, test, parameters):
    """What needs no program, and one program each: an interpreter for GPUs takes seconds to run one, too."""
    if test in UNCOMPILED:
        return True
    if engine.of.name != WHOLE:
        return False  # tests/pallas_kernels is quick
    if engine.is_interpreted:
        return test == "test_forms_agree_with_recurrent" and parameters["length"] == 1
    if test == "test_forms_agree_on_packed_documents":
        return parameters["packing"] == "padding" and parameters["strength"] == "strong"
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    kept = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        engine, form = parameters.get("engine"), parameters.get("form")
        if item.path.name == "test_contract.py" and engine is not None:
            if not is_run(engine, form, item.originalname, parameters):
                continue
            if not is_quick(engine, form, item.originalname, parameters):
                item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group(engine.name))  # one process compiles its programs
        kept.append(item)
    items[:] = kept
