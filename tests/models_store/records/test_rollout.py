import json

import pytest
from pydantic import ValidationError

from models_store import upkeep
from models_store.__main__ import main
from models_store.errors import CorruptionError, EnsembleNotFoundError, StoreError
from models_store.records.rollout import RollOut, Rule
from tests.models_store.faults import in_processes, kill_before
from tests.onnx_members import publish


@pytest.fixture
def two(store):
    publish(store, "e", (0,))
    publish(store, "e", (1,), activate=False)
    return store


def test_a_canary_is_recorded_and_read_back(two):
    assert two.roll_out("e") is None
    plan = RollOut(version=2, share=0.25, shadow=0.5, rule=Rule(errors=None, requests=10))
    two.begin_roll_out("e", plan)
    assert two.roll_out("e") == plan
    assert two.active("e") == 1


@pytest.mark.parametrize("end", [
    lambda store: store.activate("e", 1), lambda store: store.activate("e", 2), lambda store: store.deactivate("e"),
    lambda store: store.end_roll_out("e"), lambda store: publish(store, "e", (2,)),
])  # fmt: skip
def test_each_activation_and_an_end_by_command_remove_the_canary(two, end):
    two.begin_roll_out("e", RollOut(version=2, share=1))
    end(two)
    assert two.roll_out("e") is None


def test_a_roll_back_keeps_its_reason_and_happens_once(two):
    plan = RollOut(version=2, share=1)
    two.begin_roll_out("e", plan)
    assert two.end_roll_out("e", "it failed", only=plan.id)
    assert two.roll_out("e").ended == "it failed"
    assert not two.end_roll_out("e", "again", only=plan.id)
    assert two.roll_out("e").ended == "it failed"


def test_a_roll_back_does_not_end_a_later_roll_out(two):
    first, second = RollOut(version=2, share=1), RollOut(version=2, share=0.5)
    two.begin_roll_out("e", first)
    two.begin_roll_out("e", second)
    assert not two.end_roll_out("e", "it failed", only=first.id)
    assert two.roll_out("e") == second


def test_what_cannot_stand_beside_the_active_version_is_refused(two):
    with pytest.raises(StoreError, match="active already"):
        two.begin_roll_out("e", RollOut(version=1, share=1))
    with pytest.raises(EnsembleNotFoundError):
        two.begin_roll_out("e", RollOut(version=9, share=1))
    publish(two, "e", (0,), shape=(3, 4, 4), activate=False)
    with pytest.raises(StoreError, match="other inputs"):
        two.begin_roll_out("e", RollOut(version=3, share=1))
    two.deactivate("e")
    with pytest.raises(EnsembleNotFoundError):
        two.begin_roll_out("e", RollOut(version=2, share=1))
    with pytest.raises(ValidationError, match="neither answer nor be compared"):
        RollOut(version=2)


def test_gc_keeps_a_canary_but_not_one_that_was_rolled_back(two):
    for seed in (2, 3):
        publish(two, "e", (seed,), activate=False)
    plan = RollOut(version=2, share=0.1)
    two.begin_roll_out("e", plan)
    found = upkeep.collect_garbage(two, 1)
    assert found.done == ["e@3"]
    assert found.kept["e@2"] == "it is a canary, or was just activated"
    two.end_roll_out("e", "it failed")
    assert upkeep.collect_garbage(two, 1).done == ["e@2"]


def test_a_damaged_record_is_an_error_that_names_the_remedy_and_the_remedy_works(two, capsys):
    (two.root / "e" / ".rollout").write_text("{")
    with pytest.raises(CorruptionError, match="rollout e --end"):
        two.roll_out("e")
    assert main(["--store", str(two.root), "rollout", "e", "--end"]) == 0
    assert two.roll_out("e") is None


def test_the_command_begins_shows_and_ends(two, capsys):
    store = ["--store", str(two.root)]
    assert main([*store, "rollout", "e", "2", "--share", "0.05", "--max-errors", "0.1"]) == 0
    assert json.loads((two.root / "e" / ".rollout").read_text())["rule"]["errors"] == 0.1
    assert main([*store, "list"]) == 0
    assert "~ e@2" in capsys.readouterr().out
    assert main([*store, "rollout", "e"]) == 0
    assert "answers 0.05 of the callers" in capsys.readouterr().out
    assert main([*store, "rollout", "e", "2", "--share", "7"]) == 2
    assert "share: Input should be less than or equal to 1" in capsys.readouterr().err
    assert main([*store, "rollout", "e", "--end"]) == 0
    assert main([*store, "rollout", "e"]) == 0
    assert "e has no canary" in capsys.readouterr().out


def _begin(store, share):
    store.begin_roll_out("e", RollOut(version=2, share=share))


def test_a_kill_at_any_call_leaves_the_old_state_or_the_new_one(two):
    call = 0
    while kill_before(call, _begin, two, 0.5):
        assert two.roll_out("e") is None or two.roll_out("e").share == 0.5
        two.end_roll_out("e")
        call += 1
    assert call > 5
    assert two.roll_out("e").share == 0.5
    call = 0
    while kill_before(call, two.activate, "e", 2):
        assert (two.active("e"), two.roll_out("e") and two.roll_out("e").share) in {(1, 0.5), (1, None), (2, None)}
        two.activate("e", 1)
        _begin(two, 0.5)
        call += 1
    assert two.active("e") == 2
    assert two.roll_out("e") is None


def test_of_many_at_once_one_remains_whole(two):
    in_processes(*[(_begin, two, share / 8) for share in range(1, 9)])
    assert two.roll_out("e").share * 8 in range(1, 9)
