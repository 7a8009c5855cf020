"""A model of one machine: its cores, the event loop of its worker, and the queue that batches rows.

A request costs time of the event loop (half before its rows wait, half after), which is serial, and time of members, which run in tasks on
all cores. Cores serve whoever is ready, a slice at a time. The queue is that of service/inference/batching.py: a thread that finds no task
takes half of the waiting rows as the next batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

SLICE = 0.001  # seconds for which a core serves one task while others wait, about as Linux does


@dataclass(frozen=True)
class Costs:
    """What a request of one row costs, in seconds of one core."""

    loop: float  # Python's part
    batch_loop: float  # Python's part of each batch: threads that wake each other
    idle: float  # time, of no core, until a batch begins on cores that were idle
    spread: (
        float  # standard deviation of the logarithm of the time of a batch: other work of the machine, and its memory
    )
    rows: Sequence[int]  # sizes of batches, ascending
    members: Sequence[float]  # of all members together, for a batch of each size
    tasks: int = 2  # of a batch
    cores: int = 2
    most_rows: int = 64

    def members_of(self, rows: int) -> float:
        """Time of one core for a batch; linear between the measured sizes and beyond them."""
        if rows >= self.rows[-1]:
            return self.members[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.members))

    @property
    def capacity(self) -> float:
        """Requests a second that all cores together can answer."""
        return self.cores / (self.loop + (self.batch_loop + self.members_of(self.most_rows)) / self.most_rows)


@dataclass
class _Batch:
    rows: int
    left: int  # tasks that are not started
    slower: float  # factor of its time, 1 in the mean
    running: int
    done: simpy.Event


@dataclass
class Machine:
    """One machine in a simulation."""

    env: simpy.Environment
    costs: Costs
    waited: list[float] = field(default_factory=list[float])  # time in the queue of each answered request
    answered: list[float] = field(default_factory=list[float])  # time from arrival to answer of each
    at: list[float] = field(default_factory=list[float])  # when each was answered
    seed: int = 0

    def __post_init__(self) -> None:
        self._cores = simpy.Resource(self.env, self.costs.cores)
        self._loop = simpy.Resource(self.env, 1)
        self._waiting: list[tuple[float, simpy.Event]] = []
        self._open: _Batch | None = None
        self._rng = np.random.default_rng(self.seed)
        self._work = self.env.event()
        for _ in range(self.costs.cores):
            self.env.process(self._thread())

    def request(self) -> Generator[Any, Any, None]:
        """One request from its arrival to its answer."""
        arrived = self.env.now
        yield from self._python(self.costs.loop / 2)
        joined, ready = self.env.now, self.env.event()
        self._waiting.append((joined, ready))
        self._notify()
        began = yield ready
        self.waited.append(began - joined)
        yield from self._python(self.costs.loop / 2)
        self.answered.append(self.env.now - arrived)
        self.at.append(self.env.now)

    @property
    def waiting(self) -> int:
        """Requests whose rows wait."""
        return len(self._waiting)

    def _python(self, seconds: float) -> Generator[Any, Any, None]:
        with self._loop.request() as loop:
            yield loop
            yield from self._on_a_core(seconds)

    def _on_a_core(self, seconds: float) -> Generator[Any, Any, None]:
        while seconds > 1e-9:
            with self._cores.request() as core:
                yield core
                spent = min(seconds, SLICE)
                yield self.env.timeout(spent)
            seconds -= spent

    def _notify(self) -> None:
        if not self._work.triggered:
            self._work.succeed()

    def _thread(self) -> Generator[Any, Any, None]:
        while True:
            if self._open is None or not self._open.left:
                if not self._waiting:
                    if self._work.triggered:
                        self._work = self.env.event()
                    yield self._work
                    continue
                count = min(self.costs.most_rows, -(-len(self._waiting) // 2))
                taken, self._waiting = self._waiting[:count], self._waiting[count:]
                slower = self._rng.lognormal(-(self.costs.spread**2) / 2, self.costs.spread)
                batch = _Batch(count, self.costs.tasks, slower, 0, self.env.event())
                self._open = batch
                self.env.process(self._finish(batch, taken, self.env.now))
                self._notify()
                if self._cores.count == 0:
                    yield self.env.timeout(self.costs.idle)
                yield from self._on_a_core(self.costs.batch_loop)
                if not batch.left:  # the other threads have begun all of its tasks meanwhile
                    continue
            batch = self._open
            batch.left -= 1
            batch.running += 1
            yield from self._on_a_core(batch.slower * self.costs.members_of(batch.rows) / self.costs.tasks)
            batch.running -= 1
            if not batch.left and not batch.running:
                batch.done.succeed()

    def _finish(
        self, batch: _Batch, taken: Sequence[tuple[float, simpy.Event]], began: float
    ) -> Generator[Any, Any, None]:
        yield batch.done
        for _, ready in taken:
            ready.succeed(began)


def closed(costs: Costs, connections: int, seconds: float = 20.0) -> tuple[float, float, float]:
    """Clients that each ask again when they are answered: requests a second, median and 99th percentile of the time, seconds."""
    env = simpy.Environment()
    machine = Machine(env, costs)

    def client() -> Generator[Any, Any, None]:
        while True:
            yield from machine.request()

    for _ in range(connections):
        env.process(client())
    env.run(seconds)
    return _summary(machine, seconds)


def opened(costs: Costs, rate: float, seconds: float = 60.0, seed: int = 0) -> tuple[float, float, float, float]:
    """Requests that arrive at random at this rate: as `closed`, and the mean number that wait."""
    env = simpy.Environment()
    machine = Machine(env, costs)
    rng = np.random.default_rng(seed)

    def arrivals() -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(rng.exponential(1 / rate))
            env.process(machine.request())

    env.process(arrivals())
    env.run(seconds)
    answered = _summary(machine, seconds)
    return *answered, sum(machine.waited) / seconds


def _summary(machine: Machine, seconds: float) -> tuple[float, float, float]:
    warm = seconds / 5
    kept: NDArray[np.float64] = np.array(machine.answered)[np.array(machine.at) > warm]
    if not len(kept):
        return 0.0, float("inf"), float("inf")
    return len(kept) / (seconds - warm), float(np.median(kept)), float(np.quantile(kept, 0.99))
