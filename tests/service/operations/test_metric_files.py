"""Metric files of several processes, compared with prometheus_client's own reader where that is possible."""

import errno
import fcntl
import os
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import multiprocess
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from service.operations import metric_files
from service.operations.metric_files import Archive, Pages, Sum, read

DEAD = 2**22 + 1  # no process has this id: Linux assigns at most 2**22


def key(name="modepath_refused", **labels):
    return mmap_key(name, f"{name}_total", list(labels), list(labels.values()), "help")


def write(folder, kind, process, values):
    pages = Pages(folder / f"{kind}_{process}.db")
    for name, value in values.items():
        pages.write(pages.position(name), value)
    assert pages.in_file
    return pages


def total(folder, incomplete=0):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in Sum(folder, lambda: incomplete).collect()
        for sample in metric.samples
        if metric.name != "modepath_metrics_incomplete"
    }


def reference(folder):
    registry = multiprocess.MultiProcessCollector(None, str(folder))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=50), st.floats(allow_nan=False), max_size=50))
def test_prometheus_reads_what_pages_hold(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("pages")
    pages = write(folder, "counter", 1, values)
    found = {name: value for name, value, *_ in MmapedDict.read_all_values_from_file(folder / "counter_1.db")}
    assert found == pages.values() == read(folder / "counter_1.db") == values


def test_many_values_grow_the_file(tmp_path):
    values = {key(reason=f"reason {i}"): float(i) for i in range(5000)}
    pages = write(tmp_path, "counter", 1, values)
    assert read(pages.path) == values
    assert pages.path.stat().st_size > metric_files.CAPACITY


def test_a_file_is_allocated_not_sparse(tmp_path):
    pages = write(tmp_path, "counter", 1, {})
    assert pages.path.stat().st_blocks * 512 >= metric_files.CAPACITY


def test_a_new_process_with_the_number_of_a_dead_one_goes_on_from_its_values(tmp_path):
    write(tmp_path, "counter", 1, {key(reason="a"): 3.0})
    again = Pages(tmp_path / "counter_1.db")
    assert again.values() == {key(reason="a"): 3.0}


def test_without_room_values_stay_in_memory_and_return_when_there_is(tmp_path, monkeypatch):
    pages = write(tmp_path, "counter", 1, {key(reason="a"): 1.0})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(metric_files, "_allocate", full)
        for i in range(2000):
            pages.write(pages.position(key(reason=str(i))), i)
        other = Pages(tmp_path / "counter_2.db")
        other.write(other.position(key(reason="b")), 7)
        assert not pages.in_file
        assert not other.in_file
        assert read(pages.path)[key(reason="a")] == 1.0  # unchanged
        assert not other.path.exists()
    for one in (pages, other):
        one.look()
        assert one.in_file
        assert read(one.path) == one.values()
    assert len(pages.values()) == 2001
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("remove", [lambda pages: pages.path.unlink(), lambda pages: shutil.rmtree(pages.path.parent)])
def test_a_file_that_somebody_removes_is_made_again(tmp_path, remove):
    folder = tmp_path / "folder"
    pages = write(folder, "counter", 1, {key(reason="a"): 5.0})
    remove(pages)
    pages.write(pages.position(key(reason="b")), 6.0)
    pages.look()
    assert read(pages.path) == {key(reason="a"): 5.0, key(reason="b"): 6.0}


def test_a_folder_that_somebody_else_made_in_its_place_is_not_used(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    folder = tmp_path / "folder"
    folder.symlink_to(theirs)
    assert not Pages(folder / "counter_1.db").in_file
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 64, bytes(64), b"\x40\0\0\0\0\0\0\0\xff\xff\xff\x7f"])
def test_a_file_that_is_none_of_ours_counts_for_nothing(tmp_path, content):
    (tmp_path / "counter_1.db").write_bytes(content)
    write(tmp_path, "counter", 2, {key(reason="a"): 1.0})
    assert set(total(tmp_path).values()) == {1.0}


def forged(folder, deaths, buckets=(0.1, 1.0, float("inf"))):
    for process in range(DEAD, DEAD + deaths):
        write(folder, "counter", process, {key(reason="busy"): process % 7, key(reason=str(process % 3)): 1.0})
        labels = {"ensemble": "animals", "mode": "average"}
        histogram = {
            mmap_key("modepath_queue_seconds", "modepath_queue_seconds_bucket", [*labels, "le"], [*labels.values(), str(b)], "help"): i
            for i, b in enumerate(buckets)
        }  # fmt: skip
        write(folder, "histogram", process, histogram)


def test_numbers_of_many_processes_are_summed_up_as_prometheus_does(tmp_path):
    forged(tmp_path, 20)
    assert total(tmp_path) == reference(tmp_path)
    assert total(tmp_path)


def test_the_dead_are_merged_without_a_change_of_any_number(tmp_path):
    forged(tmp_path, 200)
    living = write(tmp_path, "counter", DEAD + 1000, {key(reason="busy"): 4.0})
    before = total(tmp_path)
    archive = Archive(tmp_path)
    archive.merge([DEAD + 1000])
    assert total(tmp_path) == reference(tmp_path) == before
    assert {file.name for file in tmp_path.glob("*.db")} == {
        living.path.name, "counter_archive.db", "histogram_archive.db"
    }  # fmt: skip
    forged(tmp_path, 3)
    with_more = total(tmp_path)
    archive.merge([DEAD + 1000])
    assert total(tmp_path) == with_more
    assert with_more != before
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    archive.merge([])  # a cleaner of /tmp removes the archive, too
    assert (
        total(tmp_path)["modepath_refused_total", ("reason", "0")]
        == with_more["modepath_refused_total", ("reason", "0")]
    )


def test_files_of_processes_that_live_are_left_alone(tmp_path):
    write(tmp_path, "counter", os.getppid(), {key(reason="a"): 1.0})
    Archive(tmp_path).merge([])
    assert [file.name for file in tmp_path.glob("*.db")] == [f"counter_{os.getppid()}.db"]


def test_an_archive_that_finds_no_room_loses_nothing(tmp_path, monkeypatch):
    forged(tmp_path, 3)
    before = total(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = Archive(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(metric_files.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            archive.merge([])
    assert total(tmp_path) == before
    archive.merge([])
    assert total(tmp_path) == before


def test_nothing_is_merged_while_somebody_reads(tmp_path):
    forged(tmp_path, 1)
    files = set(tmp_path.iterdir())
    with metric_files.locked(tmp_path, fcntl.LOCK_SH) as held:
        assert held
        Archive(tmp_path).merge([])
        assert files <= set(tmp_path.iterdir())


def test_numbers_never_fall_while_the_dead_are_merged(tmp_path):
    archive = Archive(tmp_path)
    seen, failed = [], []

    def watch():
        while len(seen) < 200 and not done.is_set():
            try:
                seen.append(sum(total(tmp_path).values()))
            except Exception as error:
                failed.append(error)

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    for process in range(DEAD, DEAD + 30):
        write(tmp_path, "counter", process, {key(reason="a"): 1.0})
        archive.merge([])
    done.set()
    thread.join()
    assert not failed
    assert seen == sorted(seen)
    assert total(tmp_path) == {("modepath_refused_total", ("reason", "a")): 30.0}


def test_how_many_are_incomplete_is_among_the_metrics(tmp_path):
    [gauge] = [metric for metric in Sum(tmp_path, lambda: 2).collect() if metric.name == "modepath_metrics_incomplete"]
    assert [sample.value for sample in gauge.samples] == [2]
