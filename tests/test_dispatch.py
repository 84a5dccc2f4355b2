"""Which implementation runs, and what is said when none does."""

import jax
import pytest

from effattn_jax.dispatch import dispatch, platform


def _refusing(reason):
    def implementation(x, *, factor):
        raise NotImplementedError(reason)

    return implementation


IMPLEMENTATIONS = {
    "first": _refusing("odd length"),
    "second": lambda x, *, factor: ("second", x * factor),
    "third": lambda x, *, factor: ("third", x * factor),
    "fourth": _refusing("old device"),
}


def call(implementation, default=("first", "second", "third")):
    return dispatch("memory", IMPLEMENTATIONS, implementation, default, 3, factor=7)


def test_none_takes_the_first_of_the_default_order_that_supports_the_call():
    assert call(None) == ("second", 21)
    assert call(None, default=("third", "second")) == ("third", 21)


def test_a_name_takes_that_one():
    assert call("third") == ("third", 21)


def test_a_named_refusal_raises_with_its_reason_and_tries_no_other():
    with pytest.raises(NotImplementedError, match=r"^memory: implementation 'first' refuses this call: odd length$"):
        call("first")


@pytest.mark.parametrize("names", [("first", "third", "second"), ["fourth", "third"]])
def test_a_sequence_takes_its_own_first_that_supports_the_call(names):
    assert call(names) == ("third", 21)


@pytest.mark.parametrize("implementation", [("first", "fourth"), ("first",), None])
def test_when_all_refuse_every_reason_is_told(implementation):
    default = ("first", "fourth")
    with pytest.raises(ExceptionGroup, match="memory: no implementation supports this call") as group:
        call(implementation, default)
    names = implementation or default
    assert [type(refusal) for refusal in group.value.exceptions] == [NotImplementedError] * len(names)
    for name, refusal in zip(names, group.value.exceptions, strict=True):
        assert f"'{name}' refuses this call: {'odd length' if name == 'first' else 'old device'}" in str(refusal)


@pytest.mark.parametrize("implementation", ["fifth", ("second", "fifth"), ()])
def test_unknown_names_and_an_empty_sequence_are_errors(implementation):
    with pytest.raises(ValueError, match=r"^memory: implementation got .+; needs None or some of first, second, third"):
        call(implementation)


def test_other_errors_are_not_refusals():
    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        dispatch("memory", {"a": broken, "b": lambda: 1}, None, ("a", "b"))


def test_platform_follows_the_default_device():
    assert platform() == jax.default_backend()
    with jax.default_device(jax.devices("cpu")[1]):
        assert platform() == "cpu"
    with jax.default_device("cpu"):
        assert platform() == "cpu"
