import contextlib
import os

import pytest

from service.ensemble import Ensembles
from service.errors import ForbiddenError, NotReadyError, UnknownEnsembleError
from service.policy import Policy
from tests import onnx_members
from tests.onnx_members import publish


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
    os.utime(store.root / "a" / "active", (2e9, 2e9))
    assert loaded(store).get(None).manifest.name == "a"


def test_the_setting_says_who_answers(store):
    publish(store, "a")
    publish(store, "b")
    assert loaded(store, "a").get(None).manifest.name == "a"
    assert "'c'" in loaded(store, "c").why_not_ready()


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


def test_a_damaged_version_is_refused_once_and_the_old_one_goes_on(store, caplog):
    publish(store, "a")
    ensembles = loaded(store)
    version = publish(store, "a")
    (version.folder / "members/000.onnx").write_bytes(b"")
    for _ in range(3):
        ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert len([r for r in caplog.records if "not served anew" in r.message]) == 1


def test_a_damaged_ensemble_does_not_stop_another(store):
    version = publish(store, "a")
    publish(store, "b")
    (version.folder / "manifest.json").write_text("{}")
    ensembles = loaded(store)
    assert [s.manifest.name for s in ensembles.all()] == ["b"]


def test_a_version_of_another_schema_is_refused_and_the_old_one_goes_on(store, caplog):
    publish(store, "a")
    ensembles = loaded(store)
    newer = publish(store, "a").folder / "manifest.json"
    newer.chmod(0o644)
    newer.write_text(newer.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    ensembles.refresh()
    assert ensembles.get("a").manifest.version == 1
    assert "schema version 99" in caplog.text


def test_a_provider_that_is_asked_for_and_missing_is_told(store):
    from models_store import runtime

    if runtime._gpu_present():
        pytest.skip("this machine has a GPU")
    publish(store, "a")
    ensembles = Ensembles(store, "cuda", None)
    ensembles.refresh()
    assert "cuda" in ensembles.why_not_ready()
    with pytest.raises(NotReadyError, match="cuda"):
        ensembles.get(None)


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
    assert [s.manifest.name for s in ensembles.all()] == ["b"]
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
    monkeypatch.setattr("service.ensemble.time.monotonic", lambda: clock[0])
    ensembles = Ensembles(store, "cpu", None, warm=warm)
    for _ in range(10):
        ensembles.refresh()
    assert len(tries) == 1
    clock[0] += 1.5
    for _ in range(10):
        ensembles.refresh()
    assert len(tries) == 2
    store.activate("a", 1)
    os.utime(store.root / "a" / "active", (2e9, 2e9))  # activated anew
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
    with pytest.raises(ForbiddenError):
        ensembles.get("ends")
    assert "ends" not in [one.manifest.name for one in ensembles.all()]
    if harm in ("fails to load", "unreadable"):  # nobody knows whose networks it held
        with pytest.raises(ForbiddenError):
            ensembles.get("free")
    else:
        assert ensembles.get("free").mode(None) == "average"


def test_relatives_are_closed_before_a_defended_ensemble_is_loaded(store):
    publish(store, "ends", seeds=(0, 9))
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
    assert len([record for record in caplog.records if "could not be read" in record.message]) == 1


def test_a_policy_for_nobody_is_told(store, caplog):
    publish(store, "a")
    ensembles = Ensembles(store, "cpu", None, policies={"A": Policy(modes=("random",))})
    for _ in range(2):
        ensembles.refresh()
    assert len([r for r in caplog.records if "names 'A'" in r.message]) == 1
