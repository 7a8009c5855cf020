"""What is particular to a store in a bucket: publishers without locks, the cache, and what happens when it cannot be reached."""

import contextlib
import datetime
import gc
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models_store import files, upkeep
from models_store.__main__ import main
from models_store.errors import CorruptionError, EnsembleNotFoundError, StoreError, StoreReadError, StoreWriteError
from models_store.records.rollout import RollOut
from models_store.remote import cache, objects, records
from models_store.remote import store as remote_store
from models_store.remote.objects import Objects
from models_store.store import Store
from tests.buckets import losing_answers
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


def test_a_publisher_that_is_stopped_leaves_no_version_its_number_is_not_given_again_and_gc_removes_its_files(
    remote, monkeypatch, address
):
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
    left = [entry.key for entry in Objects(address).list("files/a/1")]
    assert left
    assert upkeep.collect_garbage(remote, 1).done == []  # it may still be publishing
    monkeypatch.setattr(remote_store, "REMAINS_AFTER", datetime.timedelta(seconds=-5))
    assert upkeep.collect_garbage(remote, 1, dry=True).done == ["the remains of a@1"]
    assert upkeep.collect_garbage(remote, 1).done == ["the remains of a@1"]
    assert Objects(address).list("files/a/1") == []
    remote.verify(remote.load("a", 2))


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


def test_activations_at_once_are_all_made_and_have_different_tokens(address, monkeypatch):
    publish(Store(address), "a")
    publish(Store(address), "a")
    tokens = []

    put_over = Objects.put_over

    def noted(self, key, content, tag):
        written = put_over(self, key, content, tag)
        if written and key == "active/a":
            tokens.append(json.loads(content)["token"])
        return written

    monkeypatch.setattr(Objects, "put_over", noted)

    def activate(number):
        Store(address).activate("a", number % 2 + 1)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(activate, range(16)))
    assert Store(address).active("a") in (1, 2)
    assert len(tokens) == len(set(tokens)) == 16
    assert Store(address).activation_token("a") in tokens


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
    version = used.load("a", 1)
    held = version.folder  # by this process
    for number in (2, 3, 4):
        subprocess.run([sys.executable, "-c", fetch % number], cwd=ROOT, check=True)
        time.sleep(0.05)
    there = [number for number in (1, 2, 3, 4) if copies("a", number).is_dir()]
    assert 1 in there
    assert 4 in there
    assert len(there) == 2
    used.verify(version)
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


@pytest.mark.parametrize("how", ["closed", "late"])
def test_an_answer_that_was_lost_does_not_make_a_write_look_lost(address, buckets, monkeypatch, how):
    monkeypatch.setattr(objects, "_TRY_SECONDS", 1)
    with losing_answers(buckets.url, how) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        bucket = Objects(address)
        for expected, write in (
            (True, lambda: bucket.put_new("k", b"mine")),
            (False, lambda: bucket.put_new("k", b"theirs")),
            (True, lambda: bucket.put_over("k", b"next", bucket.get("k")[1])),
            (False, lambda: bucket.put_over("k", b"other", "no such tag")),
        ):
            proxy.lose_next_put()
            assert write() is expected
            assert proxy.lost
        assert bucket.get("k")[0] == b"next"


def test_a_file_is_fetched_from_a_bucket_that_takes_longer_than_one_try(
    address, remote, monkeypatch, buckets, tmp_path
):
    content = bytes(range(256)) * 4000
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(objects, "_TRY_SECONDS", 1)
    monkeypatch.setattr(objects, "_ALL_SECONDS", 2)
    monkeypatch.setattr(objects, "_PART_BYTES", 100_000)
    with losing_answers(buckets.url, "slow") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        bucket = Objects(address)
        bucket.put("file", tmp_path / "file")
        assert bucket.download("file", tmp_path / "copy")  # 100 000 bytes a second: ten seconds
    assert (tmp_path / "copy").read_bytes() == content
    assert not bucket.download("none", tmp_path / "copy")


def test_what_an_operator_activates_is_not_undone_by_a_publisher_that_was_killed(either, monkeypatch):
    publish(either, "a")
    publish(either, "a")
    killed = type(either._activations)
    with monkeypatch.context() as patch:
        for step in ("serve", "replace"):
            patch.setattr(killed, step, lambda *given, **named: (_ for _ in ()).throw(KeyError), raising=False)
        with pytest.raises(KeyError):
            publish(either, "a")
    either.activate("a", 1)
    publish(either, "a", activate=False)
    assert either.active("a") == 1
    either.deactivate("a")
    publish(either, "a", activate=False)
    with pytest.raises(EnsembleNotFoundError):
        either.active("a")


def test_an_older_pending_version_does_not_replace_a_newer_active_one_nor_end_its_canary(remote, address, monkeypatch):
    publish(remote, "a")
    with monkeypatch.context() as patch:
        patch.setattr(records.RemoteActivations, "serve", lambda *given, **named: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            publish(remote, "a")
    other = Store(address)
    load = Store.load

    def late(self, *given):  # another publisher is faster, between the look at what is pending and its activation
        monkeypatch.setattr(type(other), "load", load_remote)
        publish(Store(address), "a")
        Store(address).begin_roll_out("a", RollOut(version=1, share=0.5))
        return load_remote(self, *given)

    load_remote = type(other).load
    assert load_remote is not load
    monkeypatch.setattr(type(other), "load", late)
    assert not other.finish_activation("a", 2)
    assert Store(address).active("a") == 3
    assert Store(address).canary("a") == 1


def test_a_copy_does_not_overwrite_a_version_that_is_being_published(address, tmp_path, monkeypatch):
    source = Store(tmp_path / "source")
    publish(source, "a", seeds=(7, 8))
    sent = Objects.put

    def put(self, key, content):
        if key == "files/a/1/members/000.onnx":  # at this moment somebody copies the same number
            monkeypatch.setattr(Objects, "put", sent)
            with pytest.raises(StoreError, match=r"begun by another publisher.*Nothing was published"):
                Store(address).adopt(source.load("a"))
        sent(self, key, content)

    monkeypatch.setattr(Objects, "put", put)
    publish(Store(address), "a")
    Store(address).verify(Store(address).load("a"))


def test_processes_that_open_a_version_at_the_same_time_all_get_it(address, remote, buckets):
    for _ in range(3):
        publish(remote, "a")
    program = (
        "import sys; from pathlib import Path; from models_store.store import Store; sys.stdin.read(1)\n"
        f"for n in (1, 2, 3):\n  s = Store(Path({address!r})); v = s.load('a', n); s.verify(v); print(v.name)"
    )
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            for _ in range(4)
        ]
        answers = [other.communicate("x")[0].split() for other in others]
    assert answers == [["a@1", "a@2", "a@3"]] * 4


def test_what_nothing_refers_to_any_more_may_be_evicted(address, remote, monkeypatch):
    size = sum(len(Objects(address).get(f"files/a/1/{path}")[0]) for path in publish(remote, "a").manifest.files)
    monkeypatch.setenv("MODEPATH_CACHE_GIB", str(1.5 * size / 2**30))
    store = Store(address)
    for number in range(1, 5):
        publish(remote, "a")
        store.load("a", number).folder  # noqa: B018
        gc.collect()
    assert [number for number in range(1, 5) if copies("a", number).is_dir()] == [4]


def test_what_killed_publishers_left_in_the_cache_is_removed_by_the_next(address, remote):
    program = (
        "import os, sys; from pathlib import Path; from models_store.store import Store\n"
        f"with Store(Path({address!r})).staging('a') as staged:\n  print(staged, flush=True)\n  sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        left = Path(other.stdout.readline().strip())
        publish(remote, "a")
        assert left.is_dir()  # it is alive
        other.kill()
    publish(remote, "a")
    assert not left.exists()


@pytest.mark.parametrize("given", ["20GB", "-1", "nan"])
def test_a_limit_of_the_cache_that_is_not_a_size_is_refused(address, monkeypatch, given):
    monkeypatch.setenv("MODEPATH_CACHE_GIB", given)
    with pytest.raises(StoreError, match=r"MODEPATH_CACHE_GIB must be a number of GiB"):
        Store(address)


def test_an_error_after_the_manifest_says_what_is_published(remote, monkeypatch):
    def failing(*given, **named):
        raise StoreWriteError("stopped.")

    with monkeypatch.context() as patch:
        patch.setattr(records.RemoteActivations, "serve", failing)
        with pytest.raises(StoreWriteError, match=r"a@1 is published but not activated; run: python -m models_store"):
            publish(remote, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", failing)
        with pytest.raises(StoreWriteError, match=r"Nothing was published"):
            publish(remote, "b")


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
