import multiprocessing
import os
import shutil
import threading

import pytest

from service.inference.verdicts import DEATH_PAUSE, FIRST_PAUSE, MAX_PAUSE, RefusedError, Verdicts, refusal


def test_workers_share_records_and_say_a_thing_once(tmp_path):
    one, two = Verdicts(tmp_path / "shared"), Verdicts(tmp_path / "shared")
    assert two.read("a") is None
    one.write("a", {"found": 1})
    assert two.read("a") == {"found": 1}
    assert one.first("something", 1)
    assert not one.first("something", 1)
    assert not two.first("something", 1)
    assert two.first("something", 2)


def test_one_worker_at_a_time_has_the_turn(tmp_path):
    one, two = Verdicts(tmp_path / "shared"), Verdicts(tmp_path / "shared")
    order = []

    def wait():
        with two.turn("a"):
            order.append("two")

    with one.turn("a"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        with two.turn("b"):  # a turn for another key does not wait
            order.append("other")
        waiting.join(0.2)
        order.append("one")
    waiting.join(20)
    assert order == ["other", "one", "two"]


def test_what_cost_other_workers_their_lives_waits_longer_each_time(tmp_path):
    one = Verdicts(tmp_path / "shared")
    with one.surviving("a", "token"):
        with one.surviving("a", "token"):  # another worker that is alive is no reason to wait
            pass
        with pytest.raises(ZeroDivisionError), one.surviving("a", None):  # nor is an exception
            raise ZeroDivisionError
    for deaths in (1, 2):
        before = {**one._begun("a")}
        one.write("a", {pid: when - 1000 for pid, when in before.items()})
        process = multiprocessing.get_context("spawn").Process(target=_dies_opening, args=(tmp_path / "shared",))
        process.start()
        process.join(30)
        with pytest.raises(RefusedError, match=f"{deaths} worker") as refused, one.surviving("a", "token"):
            pass
        assert refused.value.refusal.pause == DEATH_PAUSE * deaths
        assert refused.value.refusal.holds("token")
        assert not refused.value.refusal.holds("another")


def _dies_opening(folder):
    with Verdicts(folder).surviving("a", None):
        os._exit(1)


@pytest.mark.parametrize("harm", ["removed", "a file", "damaged", "not ours"])
def test_without_its_folder_each_worker_goes_on_by_itself(tmp_path, harm):
    folder = tmp_path / "shared"
    one, two = Verdicts(folder), Verdicts(folder)
    one.write("a", 1)
    if harm == "damaged":
        for file in folder.iterdir():
            file.write_bytes(b"no pickle")
    elif harm == "not ours":
        folder.chmod(0o777)  # any user could have written there
    else:
        shutil.rmtree(folder)
    if harm == "a file":
        folder.write_text("")
    with one.turn("a"):
        assert one.read("a") == 1
        assert two.read("a") is None
    assert two.first("something")
    one.write("b", 2)
    assert one.read("b") == 2
    if harm == "removed":  # it is created again
        assert two.read("b") == 2


def test_pauses_grow_and_are_long_where_a_trial_was(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("service.inference.verdicts.time.monotonic", lambda: clock[0])
    before, pauses = None, []
    for _ in range(20):
        before = refusal(before, "why", "token", spent=0.0)
        pauses.append(before.pause)
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == MAX_PAUSE
    assert before.holds("token")
    assert not before.holds("another")
    assert refusal(before, "why", "another", spent=0.0).pause == FIRST_PAUSE
    assert refusal(None, "why", "token", spent=120.0).pause == 1200
    clock[0] += MAX_PAUSE
    assert not before.holds("token")
