import pytest
from pydantic import ValidationError

from service.inference.policy import Known, Policy, of
from service.inference.policy import closed as judged

DEFENDED = Policy(modes=("random",))


def marks(*letters):
    return frozenset(letter.encode() for letter in letters)


def test_without_a_word_only_the_average_is_open():
    assert Policy().modes == ("average",)
    assert not Policy().defended
    assert of("a", {}) == Policy()
    assert of("a", {"*": DEFENDED}) == DEFENDED
    assert of("a", {"*": DEFENDED, "a": Policy()}) == Policy()


def test_a_network_by_itself_shows_two_digits_unless_told():
    assert Policy().digits("average") == "exact"
    assert DEFENDED.digits("random") == 2
    assert Policy(modes=("keyed",), probabilities="none").digits("keyed") == "none"
    assert Policy(probabilities=3).digits("average") == 3


@pytest.mark.parametrize("wrong", [{"modes": ()}, {"modes": ("any",)}, {"probabilities": 0}, {"digits": 2}])
def test_a_wrong_policy_is_refused(wrong):
    with pytest.raises(ValidationError):
        Policy(**wrong)


@pytest.mark.parametrize("hidden", [2, "none"])
def test_what_probabilities_hide_is_not_shown_by_members_or_uncertainty_either(hidden):
    assert Policy().shows_members
    assert Policy().shows_uncertainty
    policy = Policy(probabilities=hidden)
    assert not policy.shows_members
    assert not policy.shows_uncertainty
    for field in ("members", "uncertainty"):
        assert not getattr(Policy(**{field: False}), f"shows_{field}")
        with pytest.raises(ValidationError, match="would show what that hides"):
            Policy(probabilities=hidden, **{field: True})


def test_histograms_are_hidden_where_they_hold_more_than_the_answers():
    assert not Policy().hides("average")
    assert DEFENDED.hides("random")
    assert Policy(modes=("random",), probabilities="exact").hides("random")
    mixed = Policy(modes=("average", "random"))
    assert not mixed.hides("average")
    assert mixed.hides("random")
    assert Policy(probabilities=2).hides("average")
    assert Policy(uncertainty=False).hides("average")


def closed(known, policies):
    return judged(known, policies).related


def known(**marked):
    return {name: Known(marks(*letters), 8) for name, letters in marked.items()}


def test_who_shares_networks_with_a_defended_one_is_closed_also_through_others():
    found = known(curve="xy", ends="xz", swag="z", other="w")
    assert closed(found, {"curve": DEFENDED}) == {"ends", "swag"}
    assert closed(found, {}) == set()
    assert closed(found, {"other": DEFENDED}) == set()


def test_of_defended_relatives_one_answers():
    """Two of them would give two answers to the same question, each under its own policy."""
    found = {"curve": Known(marks("x", "y"), 256), "ends": Known(marks("x", "z"), 2), "base": Known(marks("x"), 1)}
    assert closed(found, {"curve": DEFENDED, "ends": DEFENDED}) == {"ends", "base"}
    assert closed(found, {"ends": DEFENDED, "base": Policy(modes=("keyed",))}) == {"curve", "base"}
    assert closed(found, {"curve": DEFENDED, "ends": Policy(modes=("random", "average"))}) == {"ends", "base"}


def test_where_one_policy_defends_all_the_relative_with_the_most_networks_answers():
    found = {"curve": Known(marks("x", "y"), 256), "base": Known(marks("x"), 1), "other": Known(marks("w"), 1)}
    assert closed(found, {"*": DEFENDED}) == {"base"}
    assert closed(found, {"*": DEFENDED, "base": DEFENDED}) == {"curve"}


def unread(found, name):
    return {**found, name: Known(found[name].marks, found[name].networks, whole=False)}


def test_where_a_defended_one_cannot_be_read_only_those_defended_by_name_answer():
    found = unread(known(curve="x", ends="y", other="w", path=""), "path")
    assert judged(found, {"path": DEFENDED, "curve": DEFENDED}).uncertain == {"ends", "other"}
    assert judged(found, {}).uncertain == set()


def test_of_relatives_one_answers_also_where_a_version_of_one_cannot_be_read():
    found = judged(unread(known(path="x", ends="x", other="w"), "path"), {"path": DEFENDED, "ends": DEFENDED})
    assert found.related == {"path"}
    assert found.uncertain == {"other"}


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"modes": ["cascade", "random"]}, "cascade without average"),
        ({"modes": ["average", "cascade"], "probabilities": 2}, "cascade needs exact probabilities"),
        ({"modes": ["average", "cascade"], "risk": 0.1}, "risk has no guarantee in cascade"),
    ],
)
def test_a_cascade_is_closed_where_the_number_of_members_would_tell_what_is_hidden(policy, reason):
    with pytest.raises(ValidationError, match=reason):
        Policy(**policy)
