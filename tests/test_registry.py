"""Names that are known, and what is said about the others."""

import pytest

from nbhelpers.registry import Registry, unknown


@pytest.fixture
def strategies():
    registry = Registry("strategy")
    registry.register("random")(lambda: 1)
    registry.register("entropy")(lambda: 2)
    return registry


def test_a_registered_function_is_found_under_its_name_and_still_usable_itself():
    registry = Registry("strategy")

    @registry.register("first")
    def first():
        return 7

    assert registry["first"] is first
    assert first() == 7


def test_names_come_in_the_order_in_which_they_were_registered(strategies):
    assert strategies.names() == ["random", "entropy"] == list(strategies)
    assert len(strategies) == 2
    assert "entropy" in strategies and "entrpy" not in strategies


def test_an_unknown_name_says_the_nearest_one_and_all_known_ones(strategies):
    text = r"^unknown strategy 'entrpy'\. Did you mean 'entropy'\? Available: random, entropy$"
    with pytest.raises(LookupError, match=text) as caught:
        strategies["entrpy"]
    assert not isinstance(caught.value, KeyError), "a KeyError prints a repr"


def test_a_name_far_from_all_known_ones_gets_no_guess():
    assert unknown("strategy", "zzz", ["random", "entropy"]) == "unknown strategy 'zzz'. Available: random, entropy"


def test_a_name_that_is_no_text_is_named_too():
    assert unknown("strategy", 3, ["random"]) == "unknown strategy 3. Available: random"


def test_a_name_taken_twice_is_refused_and_the_first_function_stays(strategies):
    first = strategies["random"]
    with pytest.raises(ValueError, match="strategy 'random' is registered twice"):
        strategies.register("random")(lambda: 3)
    assert strategies["random"] is first
