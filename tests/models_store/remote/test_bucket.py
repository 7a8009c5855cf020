"""What is particular to a store in a bucket: publishers without locks, the cache, and what happens when it cannot be reached."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from models_store import files
from models_store.__main__ import main
from models_store.errors import CorruptionError, StoreError, StoreReadError, StoreWriteError
from models_store.remote import cache, objects, records
from models_store.remote.objects import Objects
from models_store.store import Store
from tests.conftest import ROOT
from tests.onnx_members import publish


def copies(name, number):
    (folder,) = (files.cache_folder() / "objects").iterdir()
    return folder / name / str(number)


def test_twenty_publishers_at_once_publish_twenty_versions_and_the_newest_is_active(address):
    ready = threading.Barrier(20)

    def one(number):
        store = Store(address)
        ready.wait()
        return publish(store, "a", seeds=(number, number + 1)).manifest

    with ThreadPoolExecutor(20) as threads:
        made = list(threads.map(one, range(20)))
    store = Store(address)
    assert sorted(manifest.version for manifest in made) == store.versions("a") == list(range(1, 21))
    for manifest in made:  # each number is the version of the publisher that got it
        found = store.load("a", manifest.version)
        assert found.manifest == manifest
        store.verify(found)
    assert store.active("a") == 20


def test_a_publisher_that_is_stopped_leaves_no_version_and_its_number_stays_free(remote, monkeypatch):
    sent = Objects.put

    def failing(self, key, content):
        if key.endswith("members/002.onnx"):
            raise StoreWriteError("stopped")
        sent(self, key, content)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", failing)
        with pytest.raises(StoreWriteError, match="stopped"):
            publish(remote, "a")
    assert remote.names() == []
    assert publish(remote, "a").manifest.version == 2


def test_a_publisher_that_is_stopped_before_it_activates_is_finished_by_the_next(remote, monkeypatch, address):
    publish(remote, "a")
    with monkeypatch.context() as patch:
        patch.setattr(records.RemoteActivations, "serve", lambda *given, **named: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            publish(remote, "a")
    assert Store(address).active("a") == 1
    assert Store(address).finish_activation("a", 2)
    assert Store(address).active("a") == 2
    assert not Store(address).finish_activation("a", 2)


def test_an_older_version_that_comes_late_does_not_replace_a_newer_one(remote, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    serve = records.RemoteActivations.serve

    def late(self, name, version, *, only_newer=False):
        if version == 1 and not began.is_set():  # the first publisher; the next one finishes its activation
            began.set()
            assert go_on.wait(30)
        return serve(self, name, version, only_newer=only_newer)

    monkeypatch.setattr(records.RemoteActivations, "serve", late)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(publish, remote, "a")
        assert began.wait(30)
        publish(remote, "a")
        go_on.set()
        first.result()
    assert remote.active("a") == 2


def test_activations_at_once_are_all_made_and_have_different_tokens(address):
    publish(Store(address), "a")
    publish(Store(address), "a")
    tokens = []

    def activate(number):
        store = Store(address)
        store.activate("a", number % 2 + 1)
        tokens.append(store.activation_token("a"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(activate, range(16)))
    assert Store(address).active("a") in (1, 2)
    assert None not in tokens


def test_files_are_fetched_once_and_a_damaged_copy_again(address, buckets, remote):
    made = publish(remote, "a")
    first = Store(address).load("a").folder
    own = f"GET /{address.split('/')[2]}/models/files/a/1/"
    fetched = [line for line in buckets.requests if line.startswith(own)]
    assert len(fetched) == len(made.manifest.files)
    assert Store(address).load("a").folder == first == copies("a", 1)
    assert len([line for line in buckets.requests if line.startswith(own)]) == len(fetched)
    member = first / "members/001.onnx"
    whole = member.read_bytes()
    for damage in (b"", whole[:-1], whole + b"x", whole[:50] + b"y" + whole[51:]):
        member.write_bytes(damage)
        (first / "foreign").write_text("x")
        again = Store(address).load("a")
        again.folder  # noqa: B018
        assert member.read_bytes() == whole
        remote.verify(again)
    member.unlink()
    (first / "manifest.json").write_text("{}")
    remote.verify(Store(address).load("a"))


@pytest.mark.parametrize("key", ["files/a/1/members/000.onnx", "manifests/a/1.json"])
def test_an_object_that_was_changed_or_removed_is_refused(address, remote, key):
    publish(remote, "a")
    bucket = Objects(address)
    content = bucket.get(key)[0]
    bucket.put(key, content[:-2] + b"}\n" if key.endswith("json") else content + b"x")
    if key.endswith("json"):
        bucket.put(key, content.replace(b'"fge"', b'"sgd"'))
    with pytest.raises(StoreError, match=r"is not the (file|manifest) that was published"):
        Store(address).load("a").folder  # noqa: B018
    bucket.delete(key)
    with pytest.raises(StoreError):
        Store(address).load("a", 1).folder  # noqa: B018


@pytest.mark.parametrize("content", [b"", b"x", b"1", b'{"version": "1"}', b"{}"])
def test_a_damaged_activation_is_said_and_mended_by_the_next(address, remote, content):
    publish(remote, "a")
    Objects(address).put("active/a", content)
    with pytest.raises(CorruptionError, match=r"Run: python -m models_store activate a VERSION"):
        Store(address).active("a")
    Store(address).activate("a", 1)
    assert Store(address).active("a") == 1


def test_the_cache_keeps_to_its_size_and_spares_what_is_in_use(address, remote, monkeypatch):
    sizes = []
    for _ in range(4):
        version = publish(remote, "a")
        sizes.append(sum(len(Objects(address).get(f"files/a/1/{path}")[0]) for path in version.manifest.files))
    monkeypatch.setenv("MODEPATH_CACHE_GIB", str(2.9 * sizes[0] / 2**30))
    fetch = (
        f"from pathlib import Path; from models_store.store import Store; Store(Path({address!r})).load('a', %d).folder"
    )
    used = Store(address)
    held = used.load("a", 1).folder  # by this process
    for number in (2, 3, 4):
        subprocess.run([sys.executable, "-c", fetch % number], cwd=ROOT, check=True)
        time.sleep(0.05)
    there = [number for number in (1, 2, 3, 4) if copies("a", number).is_dir()]
    assert 1 in there
    assert 4 in there
    assert len(there) == 2
    used.verify(used.load("a", 1))
    assert held.is_dir()
    assert cache._size(copies("a", 1).parent) < 2.9 * sizes[0] + 100_000


def test_a_thousand_versions_are_listed_with_a_request_for_each_thousand(address, buckets):
    bucket = Objects(address)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: bucket.put(f"manifests/e{i // 10}/{i % 10 + 1}.json", b"{}"), range(1200)))
    store = Store(address)
    before = len(buckets.requests)
    names = store.names()
    assert len(names) == 120
    assert all(store.versions(name) == list(range(1, 11)) for name in names)
    assert len(buckets.requests) - before <= 2 * (1 + int(0.25 // records.FRESH_SECONDS))


def test_many_looks_at_the_activations_take_one_request(address, buckets, remote):
    for name in ("a", "b", "c"):
        publish(remote, name)
    store = Store(address)
    store.activation_order()
    before = len(buckets.requests)
    for _ in range(5):
        assert [store.active(name) for name in ("a", "b", "c")] == [1, 1, 1]
    assert len(buckets.requests) - before <= 4


def test_a_bucket_that_cannot_be_reached_is_an_error_that_names_the_remedy(address, buckets, remote, monkeypatch):
    publish(remote, "a")
    folder = remote.load("a").folder
    monkeypatch.setattr(objects, "_TRY_SECONDS", 1)
    monkeypatch.setattr(objects, "_ALL_SECONDS", 2)
    store = Store(address)
    with buckets.unreachable():
        with pytest.raises(
            StoreReadError, match=r"cannot be read: .*credentials in the environment \(AWS_ACCESS_KEY_ID"
        ):
            store.names()
        with pytest.raises((StoreReadError, StoreWriteError)):
            publish(store, "a")
    assert store.names() == ["a"]
    assert folder.is_dir()
    publish(store, "a")


def test_an_answer_that_was_lost_does_not_make_a_write_look_lost(remote, address):
    bucket = Objects(address)
    assert bucket.put_new("k", b"mine")
    assert bucket.put_new("k", b"mine")  # a second try, after the first one succeeded
    assert not bucket.put_new("k", b"theirs")
    tag = bucket.get("k")[1]
    assert bucket.put_over("k", b"next", tag)
    assert not bucket.put_over("k", b"other", tag)


def test_the_commands_copy_a_folder_to_a_bucket_and_back(address, tmp_path, capsys):
    publish(Store(tmp_path / "one"), "a")
    assert main(["--store", str(tmp_path / "one"), "backup", address]) == 0
    assert address in capsys.readouterr().out
    assert main(["--store", address, "list"]) == 0
    assert "* " in capsys.readouterr().out
    assert main(["--store", address, "verify"]) == 0
    assert main(["--store", str(tmp_path / "two"), "restore", address]) == 0
    assert Store(tmp_path / "two").active("a") == 1
    assert main(["--store", str(tmp_path / "two"), "restore", str(tmp_path / "none")]) == 2


def test_without_a_folder_for_copies_the_store_says_what_to_set(address, monkeypatch):
    for variable in ("MODEPATH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StoreError, match=r"set \$MODEPATH_CACHE"):
        Store(address)
