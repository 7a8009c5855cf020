import errno
import itertools
import os
import random
import shutil
import socket
import stat
import sysconfig
import tempfile
import threading
from pathlib import Path
from unittest import mock

import onnx
import pytest

from models_store.errors import (
    CorruptionError,
    EnsembleNotFoundError,
    InvalidNameError,
    MemberError,
    StoreError,
    StoreReadError,
    StoreWriteError,
)
from models_store.manifest import Draft
from models_store.store import Store, default_root
from tests.models_store.faults import failing, kill_before
from tests.onnx_members import bank, linear, publish


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
    assert sorted(path.name for path in (store.root / "a").iterdir()) == ["1", "active"]


def test_a_member_that_breaks_the_contract_is_not_published(store):
    version = publish(store, "a")
    with pytest.raises(MemberError), store.staging("a") as staged:
        (staged / "members").mkdir()
        onnx.save(linear(0, output_name="scores"), staged / "members/000.onnx")
        fields = version.manifest.model_dump()
        draft = {key: fields[key] for key in ("method", "input", "classes")}
        member = {**fields["members"][0], "weight": 1.0}
        store.publish("a", staged, Draft.model_validate({**draft, "members": [member]}))
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

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreWriteError, match=r"disk is full.*Nothing was published"):
        publish(store, "a")
    assert store.versions("a") == [1]
    assert not list((store.root / "a").glob(".staging-*"))


def test_a_store_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError, match="not writable"):
        Store(tmp_path / "file" / "store").check_writable("a")


def test_a_name_that_belongs_to_another_user_is_told_before_training(store, monkeypatch):
    publish(store, "a")
    store.check_writable("b")
    there = tempfile.TemporaryFile

    def denied(**options):
        if options["dir"] == store.root / "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return there(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(StoreWriteError, match="not writable"):
        store.check_writable("a")


def test_the_next_user_of_a_shared_store_may_publish_whatever_the_umask_of_the_first(tmp_path):
    store = Store(tmp_path / "store")
    store.root.mkdir()
    store.root.chmod(0o2775)
    before = os.umask(0o077)
    try:
        publish(store, "a")
    finally:
        os.umask(before)
    records = store.root / ".numbers"
    assert stat.S_IMODE(records.stat().st_mode) == 0o2775
    assert {stat.S_IMODE(file.stat().st_mode) for file in records.glob(".*lock")} == {0o664}


def test_find_run_finds_only_what_lies_here(store):
    publish(store, "a")
    assert store.find_run("a", "unknown") is None


@pytest.fixture
def no_disk(monkeypatch):
    """Disable fsync: no test here depends on what survives a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_every_flipped_bit_of_a_version_is_found(store):
    version = publish(store, "a", seeds=(0,), shape=(1, 2, 2), bank=bank(points=2, shape=(1, 2, 2)))
    paths = [path for path in version.folder.rglob("*") if path.is_file()]
    assert {path.relative_to(version.folder).parts[0] for path in paths} == {
        "manifest.json",
        "examples.safetensors",
        "members",
        "bank",
        "vertices",
    }
    bits = [(path, bit) for path in paths for bit in range(8 * path.stat().st_size)]
    manifest_bits = [(path, bit) for path, bit in bits if path.name == "manifest.json"]
    draws = random.Random(0)
    for path, bit in draws.sample(bits, 700) + draws.sample(manifest_bits, 300):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoreError):
            store.verify(store.load("a", 1))
        path.write_bytes(content)
    store.verify(store.load("a", 1))


def test_a_manifest_that_was_exchanged_since_it_was_read_is_found(store):
    version = publish(store, "a", seeds=(0,))
    other = publish(Store(store.root.parent / "other"), "a", seeds=(0,), temperature=2.0)
    shutil.copy(other.folder / "manifest.json", version.folder / "manifest.json")
    with pytest.raises(CorruptionError, match=r"manifest\.json is not the file"):
        store.verify(version)


def test_the_digest_tells_versions_apart_and_is_that_of_the_file(store, tmp_path):
    published = publish(store, "a")
    assert store.load("a").digest == published.digest
    shutil.rmtree(store.root)
    again = publish(store, "a", temperature=2.0)
    assert again.name == published.name
    assert again.digest != published.digest


def test_a_version_of_a_release_without_digests_is_read_and_verified(store):
    version = publish(store, "a")
    file = version.folder / "manifest.json"
    before = version.manifest.model_copy(update={"digest": None})
    file.write_text(before.dump())
    assert '"digest"' not in file.read_text()
    found = store.load("a")
    assert found.manifest == before
    store.verify(found)


@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "socket", "folder", "file"])
@pytest.mark.parametrize("at", ["members/999.onnx", "more", "members/000.onnx", "manifest.json", "bank"])
def test_whatever_else_lies_in_a_version_is_found_and_never_opened(store, tmp_path, monkeypatch, kind, at):
    version = publish(store, "a")
    path = version.folder / at
    if path.exists():
        path.rename(tmp_path / "before")
    if kind == "link":
        path.symlink_to(tmp_path / "before")
    elif kind == "link to a folder":
        path.symlink_to(tmp_path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
    with pytest.raises(StoreError):
        store.verify(store.load("a", 1))


def test_a_file_that_has_grown_beyond_what_may_be_read_is_not_read(store):
    version = publish(store, "a")
    os.truncate(version.folder / "members/000.onnx", 2**40)  # sparse
    with pytest.raises(CorruptionError, match="at most"):
        store.verify(version)
    os.truncate(version.folder / "manifest.json", 2**40)
    with pytest.raises(CorruptionError, match="at most"):
        store.load("a", 1)


def test_a_version_that_is_a_link_is_refused(store, tmp_path):
    publish(store, "a")
    (store.root / "a/1").rename(tmp_path / "elsewhere")
    (store.root / "a/1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="symbolic link"):
        store.load("a")
    assert store.versions("a") == [1]


def test_a_root_that_cannot_be_listed_is_not_an_empty_store(store, monkeypatch):
    assert store.names() == []
    publish(store, "a")
    listed = os.listdir

    def broken(folder):
        if Path(folder) == store.root:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(StoreReadError, match="Input/output error"):
        store.names()
    with pytest.raises(StoreReadError, match="not a folder"):
        Store(store.root / "a/active").names()


def test_an_ensemble_that_cannot_be_listed_keeps_its_name_and_stops_no_other(store, monkeypatch):
    for name in "ab":
        publish(store, name)
    listed = os.listdir

    def broken(folder):
        if Path(folder) == store.root / "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", broken)
    assert store.names() == ["a", "b"]
    with pytest.raises(StoreReadError):
        store.versions("a")


@pytest.mark.parametrize("address", ["ftp://bucket/models", "file:///srv/store", "https://x/y"])
def test_an_address_of_something_else_than_object_storage_is_refused(address, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELS_STORE", address)
    for make in (Store, lambda: Store(Path(address))):
        with pytest.raises(StoreError, match="is not an address of object storage"):
            make()
    assert not list(tmp_path.iterdir())


def test_the_first_publication_makes_every_folder_that_it_adds_durable(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(Path(f"/proc/self/fd/{descriptor}").readlink()))
    store = Store(tmp_path / "parent" / "store")
    publish(store, "a")
    here = store.root
    assert {tmp_path, tmp_path / "parent", here, here / "a", here / ".numbers"} <= synced


def _publish(root, seed, activate=True):
    publish(Store(root), "a", seeds=(seed,), activate=activate)


def test_killed_at_any_call_a_publication_is_whole_or_absent_and_the_next_one_finishes_its_activation(store, no_disk):
    _publish(store.root, 0)
    seen, activated, calls = {1}, 0, 0
    while kill_before(calls, _publish, store.root, calls + 1):
        found = set(store.versions("a")) - seen
        assert len(found) <= 1
        for version in found:
            assert version > max(seen)
            store.verify(store.load("a", version))
            if store.active("a") != version:
                activated += 1
                assert store.finish_activation("a", version)
                assert store.active("a") == version
                assert not store.finish_activation("a", version)
        seen |= found
        assert store.active("a") == max(seen)
        calls += 1
    publish(store, "a")
    assert activated > 1
    assert sorted(path.name for path in (store.root / "a").iterdir() if not path.name.isdecimal()) == ["active"]


def _stopped_before_activation(store):
    """Publish version 2 as a process does that is stopped before it activates it."""
    publish(store, "a")
    with mock.patch.object(Store, "_activate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        publish(store, "a")
    assert store.versions("a") == [1, 2]
    assert store.active("a") == 1
    return 2


def test_what_was_activated_since_is_not_replaced_by_a_pending_activation(store):
    version = _stopped_before_activation(store)
    store.activate("a", 1)
    assert not store.finish_activation("a", version)
    publish(store, "a", activate=False)
    assert store.active("a") == 1


def test_the_next_publication_finishes_a_pending_activation(store):
    version = _stopped_before_activation(store)
    assert store.active("a") == 1
    publish(store, "a", activate=False)
    assert store.active("a") == version


def test_a_pending_version_that_was_damaged_since_stops_no_publication(store):
    version = _stopped_before_activation(store)
    (store.root / "a" / str(version) / "manifest.json").write_text("{}")
    publish(store, "a", activate=False)
    assert store.active("a") == 1


@pytest.mark.parametrize("activate", [True, False])
def test_nothing_is_pending_after_a_publication(store, activate):
    publish(store, "a")
    version = publish(store, "a", activate=activate).manifest.version
    store.activate("a", 1)
    assert not store.finish_activation("a", version)
    assert not (store.root / "a/.pending").exists()


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE])
def test_whatever_call_fails_the_message_says_what_was_published(store, no_disk, number, lasting):
    publish(store, "a")
    outcomes = set()
    for call in itertools.count():
        before = store.versions("a")
        with failing(call, number, lasting=lasting) as refused:
            try:
                publish(store, "a", seeds=(call,))
                said = None
            except StoreWriteError as error:
                said = str(error)
            except MemberError:  # reading a member back failed before anything was published
                said = "Nothing was published."
        if not refused:
            break
        made = [version for version in store.versions("a") if version not in before]
        if said is None:
            assert store.active("a") == max(before) + 1
        elif not made:
            assert "Nothing was published" in said
            assert "is published" not in said
        elif store.active("a") != made[0]:
            assert (
                f"a@{made[0]} is published but not activated; run: python -m models_store activate a {made[0]}" in said
            )
        else:
            assert f"a@{made[0]} is active" in said
        outcomes.add((said is None, bool(made)))
        publish(store, "a")
        store.verify(store.load("a"))
        assert not list(store.root.rglob(".staging-*"))
    assert {(False, False), (False, True)} <= outcomes


def test_an_error_of_the_callers_own_files_is_not_said_to_be_the_stores(store, tmp_path):
    with pytest.raises(FileNotFoundError), store.staging("a"):
        (tmp_path / "image.png").read_bytes()
    with pytest.raises(StoreWriteError, match="Nothing was published"), store.staging("a") as staged:
        (staged / "members/000.onnx").write_bytes(b"")


def test_a_removed_ensemble_does_not_break_the_locks_of_its_publishers(store):
    publish(store, "a")
    with pytest.raises(StoreWriteError, match="removed meanwhile"), store.staging("a") as staged:
        shutil.rmtree(store.root / "a")
        (staged / "members").mkdir()
    publish(store, "a")
    assert store.active("a") == 2


def test_an_adopted_version_is_the_same_one_in_a_store_of_its_own(store, tmp_path):
    publish(store, "a")
    version = publish(store, "a", bank=bank(points=2))
    other = Store(tmp_path / "other")
    copy = other.adopt(version)
    assert (copy.name, copy.digest) == ("a@2", version.digest)
    other.verify(other.load("a"))
    assert other.activation_order() == ["a"]
    assert publish(other, "a").manifest.version == 3
    with pytest.raises(StoreError, match="exists already"):
        other.adopt(version)


def test_a_damaged_version_is_not_adopted(store, tmp_path):
    version = publish(store, "a")
    (version.folder / "members/001.onnx").write_bytes(b"")
    other = Store(tmp_path / "other")
    with pytest.raises(CorruptionError):
        other.adopt(version)
    assert other.names() == []


def test_an_installed_package_keeps_ensembles_in_the_users_folder_and_a_checkout_in_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELS_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    checkout, installed = tmp_path / "checkout/models_store", tmp_path / "site-packages/models_store"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(installed.parent))
    assert default_root(checkout) == checkout / "ensembles"
    assert default_root(installed) == tmp_path / "data/modepath/ensembles"
    (installed / "ensembles").mkdir(parents=True)  # of an earlier release
    assert default_root(installed) == installed / "ensembles"
    monkeypatch.setenv("MODELS_STORE", str(tmp_path / "mine"))
    assert default_root(installed) == tmp_path / "mine"
