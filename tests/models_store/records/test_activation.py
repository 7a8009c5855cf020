import os
import shutil
import time

import pytest

from models_store.errors import CorruptionError, EnsembleNotFoundError, StoreReadError
from models_store.store import Store
from tests.models_store.faults import PROCESSES, in_processes, kill_before
from tests.onnx_members import publish


@pytest.fixture
def two(store):
    """A store whose ensemble `a` has two versions, the first of them active."""
    publish(store, "a")
    publish(store, "a", activate=False)
    return store


@pytest.fixture
def no_disk(monkeypatch):
    """Disable fsync: no test here depends on what survives a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _activate(root, version):
    Store(root).activate("a", version)


def _activate_often(root, version, times):
    os.fsync = lambda descriptor: None  # only the order of writes is tested; real syncs would take minutes
    for _ in range(times):
        Store(root).activate("a", version)


def _watch(root, done, results):
    store, found = Store(root), set()
    while not done.is_set():
        try:
            found.add(store.active("a"))
        except Exception as error:
            found.add(repr(error))
        time.sleep(0.0002)
    results.put(found)


def test_two_processes_that_activate_at_once_disturb_neither_each_other_nor_a_reader(two):
    done, results = PROCESSES.Event(), PROCESSES.SimpleQueue()
    reader = PROCESSES.Process(target=_watch, args=(two.root, done, results))
    reader.start()
    in_processes((_activate_often, two.root, 1, 1500), (_activate_often, two.root, 2, 1500))
    done.set()
    assert results.get() <= {1, 2}
    reader.join()
    assert two.active("a") in (1, 2)


def test_killed_at_any_call_an_activation_is_done_or_not_and_the_next_one_works(two, no_disk):
    calls = 0
    while kill_before(calls, _activate, two.root, 2):
        calls += 1
        assert two.active("a") in (1, 2), calls
        assert two.activation_order() == ["a"]
        two.activate("a", 1)
        assert two.active("a") == 1
        left = [path.name for path in two.root.rglob("*.new")]
        assert not left, calls
    assert calls > 10
    assert two.active("a") == 2


def test_the_ensemble_activated_last_is_at_the_end_of_the_order(store):
    for name in ("b", "a", "c"):
        publish(store, name)
    publish(store, "d", activate=False)
    assert store.activation_order() == ["b", "a", "c"]
    store.activate("b", 1)
    assert store.activation_order() == ["a", "c", "b"]
    shutil.rmtree(store.root / "c")
    assert store.activation_order() == ["a", "b"]


def test_the_order_survives_a_copy_and_does_not_follow_times(store, tmp_path):
    for name in ("b", "a"):
        publish(store, name)
    os.utime(store.root / "b/active", (4e9, 4e9))
    shutil.copytree(store.root, tmp_path / "copy", copy_function=shutil.copyfile)
    for found in (store, Store(tmp_path / "copy")):
        assert found.activation_order() == ["b", "a"]


def test_names_that_the_record_lacks_come_first_by_time_and_the_future_is_now(store):
    names = ["a", "b", "c", "d"]
    for name in names:
        publish(store, name)
    (store.root / ".activated").unlink()  # like a store from an early release, which had no such record
    now = time.time()
    for name, at in zip(names, (now - 5, now - 9, now + 1e6, now - 7), strict=True):
        os.utime(store.root / name / "active", (at, at))
    assert store.activation_order() == ["b", "d", "a", "c"]
    store.activate("d", 1)
    assert store.activation_order() == ["b", "a", "c", "d"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../a\n\n\nb\n", b"", "link", "folder"])
def test_a_damaged_order_is_no_more_than_a_missing_one_and_the_next_activation_mends_it(store, content):
    for name in ("b", "a"):
        publish(store, name)
        os.utime(store.root / name / "active", (1e9, 1e9))
    record = store.root / ".activated"
    record.unlink()
    if content == "link":
        record.symlink_to("/etc/passwd")
    elif content == "folder":
        record.mkdir()
    else:
        record.write_bytes(content)
    assert sorted(store.activation_order()) == ["a", "b"]
    if content != "folder":
        store.activate("b", 1)
        assert store.activation_order() == ["a", "b"]
        assert record.read_text() == "a\nb\n"


def test_activating_another_version_leaves_what_a_publisher_has_announced(store):
    publish(store, "a")
    publish(store, "a")
    activations = store._activations
    activations.announce("a", 3)  # its publisher has not renamed the folder yet
    store.activate("a", 1)
    assert activations.pending("a") == 3
    activations.announce("a", 2)
    store.activate("a", 1)
    assert activations.pending("a") is None


def test_the_token_changes_with_each_activation_of_the_same_version(store):
    assert store.activation_token("a") is None
    publish(store, "a")
    before = store.activation_token("a")
    assert store.activation_token("a") == before
    store.activate("a", 1)
    assert store.activation_token("a") != before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"9" * 5000, b"1.0\n", b"\xd9\xa1\n", b"0\n", b"-1\n", b"", b"1 2\n"]
)
def test_what_is_no_number_is_refused_and_not_repeated(store, content):
    publish(store, "a")
    (store.root / "a/active").write_bytes(content)
    with pytest.raises(CorruptionError, match="activate a VERSION") as refused:
        store.active("a")
    assert "9999" not in str(refused.value)
    store.activate("a", 1)
    assert store.active("a") == 1


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_active_is_opened_only_where_it_is_a_file(store, tmp_path, kind):
    publish(store, "a")
    active = store.root / "a/active"
    active.unlink()
    (tmp_path / "secret").write_text("1\n")
    if kind == "link":
        active.symlink_to(tmp_path / "secret")
    elif kind == "fifo":
        os.mkfifo(active)
    else:
        active.mkdir()
    with pytest.raises(CorruptionError, match="instead of a regular file"):
        store.active("a")


def test_an_ensemble_of_which_nothing_is_active_says_so(store):
    publish(store, "a", activate=False)
    with pytest.raises(EnsembleNotFoundError, match="No version of 'a' is active"):
        store.active("a")
    assert store.names() == ["a"]
    assert store.activation_order() == []


def test_a_disk_that_does_not_answer_is_not_a_missing_activation(store, monkeypatch):
    publish(store, "a")

    def broken(*arguments):
        raise OSError(5, "Input/output error", str(arguments[0]))

    monkeypatch.setattr("models_store.files.os.open", broken)
    with pytest.raises(StoreReadError, match="Input/output"):
        store.active("a")


def test_a_deactivated_ensemble_stays_published_and_can_be_served_again(store):
    publish(store, "a")
    publish(store, "b")
    publish(store, "a")
    store.deactivate("a")
    with pytest.raises(EnsembleNotFoundError, match="No version of 'a' is active"):
        store.active("a")
    assert store.versions("a") == [1, 2]
    assert store.activation_order() == ["b"]
    with pytest.raises(EnsembleNotFoundError, match="No version of 'a' is active"):
        store.deactivate("a")
    store.activate("a", 1)
    assert store.activation_order() == ["b", "a"]
    assert store.active("a") == 1
