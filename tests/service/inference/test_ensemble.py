import contextlib
import os
import shutil
import subprocess
import threading
import time

import pytest

from models_store.errors import StoreError
from service.http.errors import ForbiddenError, NotReadyError, UnknownEnsembleError
from service.inference import ensemble as ensemble_module
from service.inference.ensemble import Ensembles
from service.inference.policy import Policy
from service.inference.trial import Direct
from service.inference.verdicts import Verdicts
from tests import onnx_members
from tests.onnx_members import publish, publish_broken


def loaded(store, default=None):
    ensembles = Ensembles(store, "cpu", default)
    ensembles.refresh()
    return ensembles


def test_before_the_first_look_it_is_not_ready(store):
    publish(store, "a")
    ensembles = Ensembles(store, "cpu", None)
    assert "being loaded" in ensembles.why_not_ready()
    for name in (None, "a"):
        with pytest.raises(NotReadyError):
            ensembles.get(name)


def test_an_empty_store_says_what_to_do(store):
    assert "training.fge" in loaded(store).why_not_ready()


def test_the_ensemble_activated_last_answers_when_none_is_named(store):
    publish(store, "a")
    publish(store, "b")
    store.activate("a", 1)
    assert loaded(store).get(None).manifest.name == "a"


def test_the_setting_says_who_answers(store):
    publish(store, "a")
    publish(store, "b")
    assert loaded(store, "a").get(None).manifest.name == "a"
    assert loaded(store, "c").why_not_ready().endswith("Name another one: a, b.")


def test_an_unknown_name_is_told_with_the_known_ones(store):
    publish(store, "a")
    with pytest.raises(UnknownEnsembleError, match="Served: a"):
        loaded(store).get("b")


def test_a_new_activation_is_picked_up(store):
    publish(store, "a")
    ensembles = loaded(store)
    before = ensembles.get("a")
    ensembles.refresh()
    assert ensembles.get("a") is before
    publish(store, "a")
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 2


def test_an_ensemble_that_takes_long_to_be_brought_in_is_not_ready_instead_of_unknown(store, monkeypatch):
    monkeypatch.setattr(ensemble_module, "OVERTAKEN_SECONDS", 0.0)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Direct):
        def opens(self, candidate, recipe):
            if candidate.name == "slow":
                begun.set()
                assert go_on.wait(20)

    publish(store, "slow")
    publish(store, "a")
    ensembles = Ensembles(store, "cpu", "a", trial=Slow(store))
    following = threading.Thread(target=ensembles.refresh)
    following.start()
    assert begun.wait(20)
    with pytest.raises(NotReadyError, match="being loaded"):
        ensembles.get("slow")
    go_on.set()
    following.join(20)
    assert ensembles.get("slow").manifest.name == "slow"
    with pytest.raises(UnknownEnsembleError):
        ensembles.get("nobody")


def test_a_version_that_was_rolled_back_while_it_was_brought_in_does_not_go_live(store):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Direct):
        def opens(self, candidate, recipe):
            if candidate.number == 2:
                begun.set()
                assert go_on.wait(20)

    publish(store, "a")
    ensembles = Ensembles(store, "cpu", None, trial=Slow(store))
    ensembles.refresh()
    publish(store, "a")
    following = threading.Thread(target=ensembles.refresh)
    following.start()
    assert begun.wait(20)
    store.activate("a", 1)
    ensembles._look_again()
    go_on.set()
    following.join(20)
    assert ensembles.get("a").manifest.version == 1
    store.activate("a", 2)
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 2


def test_a_version_that_killed_the_worker_that_opened_it_is_passed_over_for_a_while_and_named(store, tmp_path, caplog):
    publish(store, "a")
    publish(store, "b")
    verdicts = Verdicts(tmp_path / "verdicts")
    dead = subprocess.Popen(["true"])
    dead.wait()
    token = store.activation_token("a")
    key = f"opening a@1 {store.digest('a', 1)} {token}"
    verdicts.write(key, {dead.pid: time.monotonic()})
    ensembles = Ensembles(store, "cpu", None, verdicts=verdicts)
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["b"]
    assert len([r for r in caplog.records if "1 worker(s) died while they opened it" in r.message]) == 1
    verdicts.write(key, {dead.pid: time.monotonic() - 100})
    again = Ensembles(store, "cpu", None, verdicts=verdicts)
    again.refresh()
    assert [one.manifest.name for one in again.all()] == ["a", "b"]


def test_a_damaged_version_is_refused_once_and_the_old_one_goes_on(store, caplog):
    publish(store, "a")
    ensembles = loaded(store)
    version = publish(store, "a")
    (version.folder / "members/000.onnx").write_bytes(b"")
    for _ in range(3):
        ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert len([r for r in caplog.records if "is not served" in r.message]) == 1


def test_a_damaged_ensemble_does_not_stop_another(store):
    version = publish(store, "a")
    publish(store, "b")
    (version.folder / "manifest.json").write_text("{}")
    ensembles = loaded(store)
    assert [s.manifest.name for s in ensembles.all()] == ["b"]
    with pytest.raises(NotReadyError, match="'a' is active, but cannot be served at the moment"):
        ensembles.get("a")


def test_a_version_of_another_schema_is_refused_and_the_old_one_goes_on(store, caplog):
    publish(store, "a")
    ensembles = loaded(store)
    newer = publish(store, "a").folder / "manifest.json"
    newer.chmod(0o644)
    newer.write_text(newer.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert "schema version 99" in caplog.text


def test_a_provider_that_is_asked_for_and_missing_is_named_in_the_log(store, caplog):
    from models_store.graphs import runtime

    if runtime._gpu_present():
        pytest.skip("this machine has a GPU")
    publish(store, "a")
    ensembles = Ensembles(store, "cuda", None)
    ensembles.refresh()
    assert "operator's log" in ensembles.why_not_ready()
    with pytest.raises(NotReadyError, match="operator's log"):
        ensembles.get(None)
    assert "cuda" in caplog.text


def test_each_new_session_is_warmed_before_it_serves(store):
    publish(store, "a")
    warmed = []
    ensembles = Ensembles(store, "cpu", None, warm=lambda session, row: warmed.append((session, row.images.shape)))
    ensembles.refresh()
    ensembles.refresh()
    assert warmed == [(ensembles.get("a").sessions["average"], (1, 1, 4, 4))]


def test_an_ensemble_that_fails_in_an_unknown_way_stops_no_other(store, caplog):
    warmed = []
    publish(store, "a")
    publish(store, "b")

    def warm(session, row):
        if not warmed:
            warmed.append(session)
            raise RuntimeError("out of something")

    ensembles = Ensembles(store, "cpu", None, warm=warm)
    ensembles.refresh()
    assert len(ensembles.all()) == 1
    assert ensembles.why_not_ready() is None
    assert "out of something" in caplog.text


def test_what_was_refused_is_not_hashed_at_every_look_but_tried_again_later(store, monkeypatch):
    publish(store, "a")
    tries = []

    def warm(session, row):
        tries.append(session)
        if len(tries) < 3:
            raise RuntimeError("not yet")

    clock = [1000.0]
    monkeypatch.setattr("service.inference.verdicts.time.monotonic", lambda: clock[0])
    ensembles = Ensembles(store, "cpu", None, warm=warm)
    for _ in range(10):
        ensembles.refresh()
    assert len(tries) == 1
    clock[0] += 1.5
    for _ in range(10):
        ensembles.refresh()
    assert len(tries) == 2
    store.activate("a", 1)
    os.utime(store.root / "a" / "active", (2e9, 2e9))  # activated again
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1


DEFENDED = {"path": Policy(modes=("random",))}


@pytest.mark.parametrize("harm", ["not active", "fails to load", "an older version", "unreadable"])
def test_relatives_of_a_defended_ensemble_answer_nobody_whatever_became_of_it(store, harm):
    path = publish(store, "path", bank=onnx_members.bank(points=4))
    publish(store, "ends", seeds=(0, 9))
    publish(store, "free", seeds=(20, 21))
    if harm == "not active":
        (store.root / "path" / "active").unlink()
    elif harm == "fails to load":
        (path.folder / "members/001.onnx").write_bytes(b"")
    elif harm == "an older version":
        publish(store, "path", seeds=(30, 31))
    else:
        (path.folder / "manifest.json").write_text("{}")
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    ensembles.refresh()
    unreadable = harm in ("fails to load", "unreadable")
    with pytest.raises(NotReadyError if unreadable else ForbiddenError):
        ensembles.get("ends")
    assert "ends" not in [one.manifest.name for one in ensembles.all()]
    if unreadable:  # it is unknown which ensembles share its networks
        with pytest.raises(NotReadyError, match="cannot be determined"):
            ensembles.get("free")
    else:
        assert ensembles.get("free").mode(None) == "average"


@pytest.mark.parametrize("remedy", ["restored", "removed"])
def test_a_damaged_old_version_of_a_defended_ensemble_closes_others_until_it_is_restored_or_removed(
    store, caplog, monkeypatch, remedy
):
    old = publish(store, "path", bank=onnx_members.bank(points=4)).folder / "manifest.json"
    publish(store, "path", bank=onnx_members.bank(points=4))
    publish(store, "free", seeds=(20, 21))
    whole = old.read_bytes()
    old.write_bytes(b"{}")
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    ensembles.refresh()
    assert ensembles.get("path").mode(None) == "random"
    with pytest.raises(NotReadyError) as said:
        ensembles.get("free")
    assert "path" not in str(said.value)
    assert str(store.root) not in str(said.value)
    named = [record.message for record in caplog.records if "path@1" in record.message]
    assert len(named) == 1
    assert "restored from a copy, or its folder removed" in named[0]
    if remedy == "restored":
        old.write_bytes(whole)
    else:
        shutil.rmtree(old.parent)
    ensembles.refresh()
    assert ensembles.get("free").mode(None) == "average"


def test_relatives_are_closed_before_a_defended_ensemble_is_loaded(store):
    publish(store, "ends", seeds=(0, 9))
    publish(store, "path", seeds=(30, 31))
    seen = []

    def warm(session, row):
        with contextlib.suppress(ForbiddenError, NotReadyError):
            seen.append((ensembles.get("ends").manifest.name, list(ensembles._served.loaded)))

    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED, warm=warm)
    ensembles.refresh()
    assert ensembles.get("ends").mode(None) == "average"
    seen.clear()
    publish(store, "path", bank=onnx_members.bank(points=4))
    ensembles.refresh()
    assert seen == []
    assert [one.manifest.name for one in ensembles.all()] == ["path"]


def test_what_cannot_be_read_is_said_once(store, caplog):
    path = publish(store, "path", bank=onnx_members.bank(points=4))
    publish(store, "path", seeds=(0, 9))
    (path.folder / "manifest.json").write_text("{}")
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    for _ in range(3):
        ensembles.refresh()
    assert len([record for record in caplog.records if "cannot be compared" in record.message]) == 1


def test_where_a_policy_names_what_the_store_never_held_nothing_answers_until_it_does(store, caplog):
    publish(store, "a")
    ensembles = Ensembles(store, "cpu", None, policies={"A": Policy(modes=("random",))})
    for _ in range(2):
        ensembles.refresh()
    assert len([r for r in caplog.records if "names 'A'" in r.message]) == 1
    assert "'A'" not in ensembles.why_not_ready()
    for name in (None, "a", "nothing"):
        with pytest.raises(NotReadyError):
            ensembles.get(name)
    assert ensembles.all() == []
    publish(store, "A", seeds=(20, 21))
    ensembles.refresh()
    assert ensembles.why_not_ready() is None
    assert {one.manifest.name for one in ensembles.all()} == {"a", "A"}
    shutil.rmtree(store.root / "A")
    ensembles.refresh()
    assert ensembles.why_not_ready() is None
    assert [one.manifest.name for one in ensembles.all()] == ["a"]
    assert "A was removed from the store" in caplog.text


def remove(store, name):
    """Remove an ensemble together with its record of numbers, so that its version numbers are reused."""
    shutil.rmtree(store.root / name)
    shutil.rmtree(store.root / ".numbers", ignore_errors=True)


def test_a_number_that_is_given_again_opens_nothing_of_a_defended_ensemble(store):
    path = publish(store, "path", seeds=(0, 1))
    publish(store, "pub", seeds=(30, 31))
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    ensembles.refresh()
    assert ensembles.get("pub").mode(None) == "average"
    remove(store, "pub")
    assert publish(store, "pub", seeds=(0, 1)).manifest.version == path.manifest.version == 1
    ensembles.refresh()
    with pytest.raises(ForbiddenError):
        ensembles.get("pub")
    assert [one.manifest.name for one in ensembles.all()] == ["path"]


def test_a_version_that_was_replaced_under_its_number_is_loaded_anew(store):
    publish(store, "n", seeds=(0, 1))
    ensembles = loaded(store)
    before = ensembles.get("n")
    remove(store, "n")
    publish(store, "n", seeds=(2,))
    ensembles.refresh()
    after = ensembles.get("n")
    assert (before.manifest.version, len(before.manifest.members)) == (1, 2)
    assert (after.manifest.version, len(after.manifest.members)) == (1, 1)


def test_relatives_of_a_defended_ensemble_that_was_removed_stay_closed(store):
    publish(store, "path", bank=onnx_members.bank(points=4))
    publish(store, "ends", seeds=(0, 9))
    publish(store, "free", seeds=(20, 21))
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    ensembles.refresh()
    shutil.rmtree(store.root / "path")
    ensembles.refresh()
    with pytest.raises(ForbiddenError):
        ensembles.get("ends")
    assert [one.manifest.name for one in ensembles.all()] == ["free"]


def test_a_copied_folder_of_a_defended_ensemble_is_refused_alone(store):
    publish(store, "path", bank=onnx_members.bank(points=4))
    publish(store, "free", seeds=(20, 21))
    shutil.copytree(store.root / "path", store.root / "another")
    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED)
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["free", "path"]


@pytest.mark.parametrize("how", ["away", "empty", "unlistable"])
def test_while_the_store_cannot_be_reached_what_is_loaded_goes_on(store, tmp_path, caplog, monkeypatch, how):
    publish(store, "a")
    publish(store, "b")
    ensembles = loaded(store)
    away = tmp_path / "away"
    if how == "unlistable":
        monkeypatch.setattr(store, "names", broken)
    else:
        store.root.rename(away)
    if how == "empty":
        store.root.mkdir()
    for _ in range(3):
        ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["a", "b"]
    assert ensembles.why_not_ready() is None
    assert len([r for r in caplog.records if "Loaded ensembles keep answering" in r.message]) == 1
    if how == "unlistable":
        monkeypatch.undo()
    else:
        shutil.rmtree(store.root, ignore_errors=True)
        away.rename(store.root)
    publish(store, "a", seeds=(5,))
    for _ in range(2):
        ensembles.refresh()
    assert ensembles.get("a").manifest.version == 2
    assert len([r for r in caplog.records if "can be read again" in r.message]) == 1


def broken():
    raise StoreError("Input/output error")


def test_an_ensemble_that_is_removed_while_others_stay_is_dropped(store, caplog):
    publish(store, "a")
    publish(store, "b")
    ensembles = loaded(store)
    shutil.rmtree(store.root / "b")
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["a"]
    assert ensembles.get(None).manifest.name == "a"
    assert "b was removed from the store" in caplog.text


def test_a_deactivated_ensemble_is_no_longer_served_until_it_is_activated_again(store, caplog):
    publish(store, "a")
    publish(store, "b")
    ensembles = loaded(store)
    store.deactivate("b")
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["a"]
    assert ensembles.get(None).manifest.name == "a"
    assert "b was deactivated" in caplog.text
    store.activate("b", 1)
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["a", "b"]


def test_an_ensemble_that_was_never_activated_is_mentioned_once(store, caplog):
    caplog.set_level("INFO")
    publish(store, "a")
    publish(store, "b", activate=False)
    ensembles = loaded(store)
    for _ in range(3):
        ensembles.refresh()
    [said] = [r for r in caplog.records if "no active version" in r.message]
    assert said.levelname == "INFO"
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("what", [b"\xff\xfe", b"9" * 5000, b"", b"7\n"])
def test_an_unreadable_active_version_stops_no_other_and_is_named_once(store, caplog, what):
    publish(store, "a")
    publish(store, "b")
    (store.root / "b" / "active").write_bytes(what)
    ensembles = loaded(store)
    ensembles.refresh()
    assert [one.manifest.name for one in ensembles.all()] == ["a"]
    assert len([r for r in caplog.records if r.message.startswith("the active version of b cannot be read")]) == 1


@pytest.mark.parametrize("policies", [{}, {"a": Policy(modes=("random",))}])
def test_a_version_that_answers_nan_replaces_no_good_one(store, caplog, policies):
    publish(store, "a")
    ensembles = Ensembles(store, "cpu", None, policies=policies)
    ensembles.refresh()
    publish_broken(store, "a", nan=True)
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert len([r for r in caplog.records if "NaN" in r.message]) == 1


def test_a_version_with_other_than_one_answer_for_each_image_replaces_no_good_one(store, caplog):
    publish(store, "a")
    ensembles = loaded(store)
    publish_broken(store, "a", squeezed=True)
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert len([r for r in caplog.records if "is not served" in r.message]) == 1


def test_an_ensemble_is_open_as_soon_as_it_is_ready_whatever_another_does(store):
    publish(store, "slow")
    publish(store, "quick")
    go_on = threading.Event()

    class Hanging(Direct):
        def opens(self, candidate, recipe):
            if candidate.name == "slow":
                go_on.wait(60)

    ensembles = Ensembles(store, "cpu", None, trial=Hanging(store))
    ensembles.follow(0.05)
    try:
        ensembles.wait(30)
        assert ensembles.get(None).manifest.name == "quick"
        assert ensembles.why_not_ready() is None
        with pytest.raises(NotReadyError, match="being loaded"):
            ensembles.get("slow")
        with pytest.raises(UnknownEnsembleError):
            ensembles.get("nobody")
        go_on.set()
        assert eventually(lambda: [one.manifest.name for one in ensembles.all()] == ["quick", "slow"])
        publish(store, "quick", seeds=(7,))
        assert eventually(lambda: ensembles.get("quick").manifest.version == 2)
    finally:
        go_on.set()
        ensembles.close()


def test_while_comparing_a_defended_ensemble_hangs_no_other_one_answers(store, monkeypatch):
    publish(store, "free", seeds=(20, 21))
    publish(store, "ends", seeds=(0, 9))
    publish(store, "path", seeds=(0, 1))
    go_on = threading.Event()
    monkeypatch.setattr("service.inference.ensemble.OVERTAKEN_SECONDS", 0.1)

    class Hanging(Direct):
        def known(self, candidate):
            if candidate.name == "path":
                go_on.wait(60)
            return super().known(candidate)

    ensembles = Ensembles(store, "cpu", None, policies=DEFENDED, trial=Hanging(store))
    ensembles.follow(0.05)
    try:
        assert eventually(lambda: len(ensembles._served.loaded) == 2)
        time.sleep(0.5)  # time for several polls
        assert ensembles.all() == []
        for name in ("free", "ends"):
            with pytest.raises(NotReadyError, match="cannot be determined"):
                ensembles.get(name)
        go_on.set()
        assert eventually(lambda: [one.manifest.name for one in ensembles.all()] == ["free", "path"])
    finally:
        go_on.set()
        ensembles.close()


def eventually(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_no_message_to_clients_names_a_path_or_what_does_not_answer(store):
    hidden = publish(store, "hidden", seeds=(5,))
    (hidden.folder / "members/000.onnx").write_bytes(b"")
    publish(store, "inactive", activate=False)
    for default in (None, "hidden"):
        ensembles = loaded(store, default)
        messages = [ensembles.why_not_ready()]
        for name in (None, "nothing"):
            with pytest.raises((NotReadyError, UnknownEnsembleError)) as said:
                ensembles.get(name)
            messages.append(str(said.value))
        publish(store, "a")
        ensembles.refresh()
        messages.append(ensembles.why_not_ready() or "")
        for message in messages:
            assert not [secret for secret in (str(store.root), "hidden", "inactive", ".onnx") if secret in message]
        shutil.rmtree(store.root / "a")
