import asyncio
import os
import subprocess
import sys
import time

import pytest

from service.operations import supervision
from service.operations.supervision import Board, Pulse, Watch


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setenv(supervision.SHARED, "")  # so that monkeypatch undoes what `make` sets
    return Board.make()


def test_workers_that_count_live_and_those_that_do_not_hang(board):
    watch = Watch(board, ticks=3)
    for count in range(20):
        board.write(0, 10, count, False)
        board.write(1, 11, min(count, 5), False)
        assert watch.tick([10, 11]) == ([11] if count >= 8 else [])


def test_without_ticks_no_time_passes(board):
    watch = Watch(board, ticks=2)
    board.write(0, 10, 1, False)
    assert not watch.tick([10])
    assert not watch.tick([10])
    board.write(0, 10, 2, False)  # both were suspended overnight and now resume
    assert not watch.tick([10])


def test_a_worker_that_starts_is_given_more_time_but_not_for_ever(board):
    watch = Watch(board, ticks=2)
    found = [watch.tick([10]) for _ in range(supervision.STARTING_TICKS + 1)]
    assert found == [[]] * supervision.STARTING_TICKS + [[10]]


def test_a_new_worker_does_not_inherit_what_the_line_held(board):
    watch = Watch(board, ticks=2)
    board.write(0, 10, 7, True)
    watch.tick([10])
    assert watch.incomplete() == 1
    for _ in range(5):
        assert not watch.tick([11])  # it has not written yet
    assert watch.incomplete() == 0


def test_a_pulse_counts_while_its_event_loop_runs_and_stands_still_when_that_is_held_up(board, monkeypatch):
    monkeypatch.setattr(supervision, "SECONDS", 0.02)
    shared = os.environ[supervision.SHARED].partition(":")[2]
    monkeypatch.setenv(supervision.SHARED, f"{os.getppid()}:{shared}")

    def count():
        return board.read()[os.getpid()][0]

    async def go():
        Pulse(3, lambda: False, lambda: 0.0, 1).start()
        while count() < 3:
            await asyncio.sleep(0.02)
        before = count()
        time.sleep(0.5)
        assert count() == before
        while count() == before:
            await asyncio.sleep(0.02)

    asyncio.run(go())
    assert board.read()[os.getpid()][1]  # its metrics are incomplete


def test_a_pulse_stands_still_while_members_work_on_one_batch_without_end(board, monkeypatch):
    monkeypatch.setattr(supervision, "SECONDS", 0.02)
    shared = os.environ[supervision.SHARED].partition(":")[2]
    monkeypatch.setenv(supervision.SHARED, f"{os.getppid()}:{shared}")
    busy = 0.0

    async def counts():
        before = board.read()[os.getpid()][0]
        await asyncio.sleep(0.3)
        return board.read()[os.getpid()][0] - before

    async def go():
        nonlocal busy
        Pulse(3, lambda: True, lambda: busy, 1).start()
        await asyncio.sleep(0.1)
        assert await counts() > 0
        busy = 1.0
        await asyncio.sleep(0.1)
        assert await counts() == 0

    asyncio.run(go())


CHILD = """
import asyncio, subprocess, sys, time
from service.operations.supervision import Board, Pulse

if sys.argv[1:] == ["worker"]:
    async def work():
        Pulse(0, lambda: True, lambda: 0.0, 30).start()
        print("works", flush=True)
        await asyncio.sleep(60)
    asyncio.run(work())
else:
    Board.make()
    worker = subprocess.Popen([sys.executable, __file__, "worker"], close_fds=False, stdout=subprocess.PIPE)
    worker.stdout.readline()
    print(worker.pid, flush=True)
"""


def test_a_worker_ends_when_its_supervisor_has_ended(tmp_path):
    psutil = pytest.importorskip("psutil")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    started = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True)
    try:
        worker = psutil.Process(int(started.stdout))
    except psutil.NoSuchProcess:
        return
    worker.wait(30)
