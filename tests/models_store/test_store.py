import errno
import os
import threading

import onnx
import pytest

from models_store import store as store_module
from models_store.errors import (
    CorruptionError,
    EnsembleNotFoundError,
    InvalidNameError,
    MemberError,
    StoreWriteError,
)
from models_store.store import Store
from tests.onnx_members import linear, publish


def test_publishing_numbers_versions_and_activates_the_newest(store):
    assert [publish(store, "a").manifest.version for _ in range(3)] == [1, 2, 3]
    assert store.versions("a") == [1, 2, 3]
    assert store.active("a") == 3
    assert store.load("a").manifest.version == 3


def test_publishing_without_activation_leaves_the_old_version_served(store):
    publish(store, "a")
    publish(store, "a", activate=False)
    assert store.active("a") == 1


def test_activate_goes_back_and_refuses_what_is_not_published(store):
    publish(store, "a")
    publish(store, "a")
    store.activate("a", 1)
    assert store.active("a") == 1
    with pytest.raises(EnsembleNotFoundError, match="published: 1, 2"):
        store.activate("a", 7)
    assert store.active("a") == 1


def test_a_published_version_verifies(store):
    store.verify(publish(store, "a"))


@pytest.mark.parametrize("damage", ["flip", "remove", "add", "link"])
def test_verify_finds_every_damage(store, damage, tmp_path):
    version = publish(store, "a")
    member = version.folder / "members/001.onnx"
    if damage == "flip":
        content = bytearray(member.read_bytes())
        content[-1] ^= 1
        member.write_bytes(content)
    elif damage == "remove":
        member.unlink()
    elif damage == "add":
        (version.folder / "members/999.onnx").write_bytes(b"")
    else:
        member.rename(tmp_path / "elsewhere")
        member.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError):
        store.verify(version)


def test_a_version_moved_to_another_name_is_refused(store):
    publish(store, "a")
    (store.root / "a").rename(store.root / "b")
    with pytest.raises(CorruptionError, match="moved"):
        store.load("b")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "-x", "a" * 65, "a\n", "ä"])
def test_names_that_could_leave_the_store_are_refused(store, name):
    with pytest.raises(InvalidNameError):
        publish(store, name)


def test_resolve_reads_name_and_version(store):
    publish(store, "a")
    publish(store, "a")
    assert store.resolve("a@1").name == "a@1"
    assert store.resolve("a").name == "a@2"
    with pytest.raises(InvalidNameError):
        store.resolve("a@x")


def test_an_empty_or_absent_store_has_no_names(store):
    assert store.names() == []
    with pytest.raises(EnsembleNotFoundError, match="Nothing is published"):
        store.load("a")


def test_a_failure_while_staging_leaves_nothing_behind(store):
    publish(store, "a")
    with pytest.raises(RuntimeError), store.staging("a") as staged:
        (staged / "members").mkdir()
        raise RuntimeError
    assert sorted(path.name for path in (store.root / "a").iterdir()) == [".lock", "1", "active"]


def test_a_member_that_breaks_the_contract_is_not_published(store):
    version = publish(store, "a")
    with pytest.raises(MemberError), store.staging("a") as staged:
        (staged / "members").mkdir()
        onnx.save(linear(0, output_name="scores"), staged / "members/000.onnx")
        fields = version.manifest.model_dump()
        draft = {key: fields[key] for key in ("method", "input", "classes")}
        member = {**fields["members"][0], "weight": 1.0}
        store.publish("a", staged, store_module.Draft.model_validate({**draft, "members": [member]}))
    assert store.versions("a") == [1]


def test_what_a_killed_publisher_left_is_cleared_by_the_next(store):
    publish(store, "a")
    (store.root / "a" / ".staging-dead" / "members").mkdir(parents=True)
    publish(store, "a")
    assert not (store.root / "a" / ".staging-dead").exists()
    assert store.versions("a") == [1, 2]


def test_publishers_of_one_name_take_turns(store):
    threads = [threading.Thread(target=publish, args=(store, "a")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.versions("a") == list(range(1, 9))
    for version in store.versions("a"):
        store.verify(store.load("a", version))


def test_a_full_disk_is_told_and_leaves_the_store_as_it_was(store, monkeypatch):
    publish(store, "a")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module, "_fsync", full)
    with pytest.raises(StoreWriteError, match="disk is full"):
        publish(store, "a")
    assert store.versions("a") == [1]
    assert not list((store.root / "a").glob(".staging-*"))


def test_a_store_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError, match="not writable"):
        Store(tmp_path / "file" / "store").check_writable()


def test_find_run_finds_only_what_lies_here(store):
    publish(store, "a")
    assert store.find_run("a", "unknown") is None
