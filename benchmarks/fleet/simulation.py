"""A day of a fleet behind a load balancer, simulated: how many machines, what is refused, what a million predictions cost.

    python -m benchmarks.fleet.simulation

First the model of one machine (machine.py) gets its costs from the cells of benchmarks/results/serving.jsonl (python -m benchmarks.serving.servers) and is
compared with the load test there. Then a fleet of such machines, in three zones, serves a day in steps of STEP seconds: load that follows the time of day, bursts, a zone
that fails, a new version every six hours, a canary, an autoscaler as deploy/kubernetes configures it. The table, with its assumptions, goes to
benchmarks/results/fleet.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.fleet.machine import Costs, closed, opened

ROOT = Path(__file__).parents[2]
CELLS, RESULT = ROOT / "benchmarks/results/serving.jsonl", ROOT / "benchmarks/results/fleet.md"
RATES = (1e3, 1e5, 1e7)  # mean predictions a second
DAY, STEP = 86_400, 5.0
USED = 1.91 / 12  # share of the members that run in `cascade` (benchmarks/results/cascade.md)
SWING = 0.6  # the load of the busiest hour is this much above the mean, that of the quietest as much below
BURSTS, BURST, BURST_SECONDS = 6, 2.0, 120.0  # bursts a day, their load as a multiple, and their duration
ZONES = 3
COLD_SECONDS = 60.0  # from the wish for a machine to its first answer
SWAP_SECONDS, SWAPS = 5.0, 4  # loading a new version takes one of the two cores for so long, so many times a day
CANARY = 0.05  # share of the requests that a canary answers or shadows for an hour
QUEUE_SECONDS = 2.0  # MODEPATH_QUEUE_SECONDS
SLOW_SECONDS = 0.2  # an answer later than this is counted as slow
CORE_HOUR = 0.04  # dollars
AT = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the capacity


@dataclasses.dataclass(frozen=True)
class Curve:
    """How one machine answers requests that arrive at random, by the share of its capacity."""

    capacity: float  # requests a second
    p99: NDArray[np.float64]
    waiting: NDArray[np.float64]

    @classmethod
    def of(cls, costs: Costs) -> Curve:
        """Measure the model at each share of what it can do."""
        capacity = closed(costs, 256)[0]
        found = [opened(costs, share * capacity, seconds=30) for share in AT]
        return cls(capacity, np.array([one[2] for one in found]), np.array([one[3] for one in found]))


def main() -> None:
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()]
    cells = [one for one in cells if (one["network"], one["members"], one["batch"]) == ("preresnet8", 12, 1)]
    cells = [one for one in cells if one["run"] == cells[-1]["run"]]
    costs = measured(cells, "npy")
    validation = compare(cells, costs)
    rows = []
    for mode, one in modes(cells, costs).items():
        curve = Curve.of(one)
        for rate in RATES:
            rows.append([mode, f"{rate:.0e}".replace("e+0", "e"), *day(one, curve, rate)])
    heads = ["mode", "predictions/s", "machines, mean", "most", "refused", f"slow (p99 over {SLOW_SECONDS * 1000:.0f} ms), share of the day", "dollars a million predictions"]  # fmt: skip
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    text = (
        f"# A simulated fleet\n\n`python -m benchmarks.fleet.simulation`\n\n## The model beside the load test\n\nTwelve `preresnet8`, one row in each request (npy), two cores; run of {cells[-1]['run']}. "
        f"Costs of a request: {1000 * costs.loop:.2f} ms of Python, {1000 * costs.members_of(32) / 32:.2f} ms of members in batches of 32; of a batch: {1000 * costs.batch_loop:.2f} ms of Python, and {1000 * costs.idle:.2f} ms until idle cores have begun. They are fitted to the rates at 1 and 64 connections and to the 99th percentile at 1 connection (the time of a batch varies by a factor of {math.exp(costs.spread):.2f}); the rest is not.\n\n{validation}\n\n## A day\n\n{table}\n\n{assumptions()}\n"
    )
    print(text)
    RESULT.write_text(text)


def measured(cells: list[dict[str, Any]], form: str) -> Costs:
    """Costs from the process without a server (members), and from the server at one connection and at 64 (Python)."""
    limits = [one for one in cells if one["server"] == "without a server"]
    sizes = (1, 8, 32)
    members = [2 * size / statistics.median(one[str(size)] for one in limits) for size in sizes]
    own = [one for one in cells if one["server"] == "modepath" and one.get("form") == form]
    one_ms, many_ms = (
        statistics.median(one["cpu_ms"] for one in own if one["connections"] == count) for count in (1, 64)
    )
    # A request at one connection is a batch; at 64 connections a batch has about a quarter of them.
    alone, among = one_ms / 1000 - members[0], many_ms / 1000 - members[-1] / sizes[-1]
    batch_loop = max(0.0, (alone - among) / (1 - 1 / 16))
    loop = alone - batch_loop
    median, p99 = (
        statistics.median(one[what] for one in own if one["connections"] == 1) / 1000 for what in ("p50", "p99")
    )
    spread = math.log1p((p99 - median) / (members[0] / 2)) / NormalDist().inv_cdf(0.99)
    return Costs(loop, batch_loop, max(0.0, median - alone - members[0] / 2), spread, sizes, members)


def modes(cells: list[dict[str, Any]], average: Costs) -> dict[str, Costs]:
    """Costs of each mode: the Python of `average`, and the members that run."""
    random = statistics.median(
        one["cpu_ms"] for one in cells if one["server"] == "modepath" and one.get("form") == "npy, random" and one["connections"] == 64
    )  # fmt: skip
    drawn = max(random / 1000 - average.loop, average.members_of(1) / 12)
    return {
        "average": average,
        "cascade": dataclasses.replace(average, members=[USED * one for one in average.members]),
        "random": dataclasses.replace(average, rows=(1, 64), members=(drawn, 64 * drawn)),
    }


def compare(cells: list[dict[str, Any]], costs: Costs) -> str:
    rows = []
    for connections in (1, 8, 64):
        own = [one for one in cells if one["server"] == "modepath" and one.get("form") == "npy" and one["connections"] == connections]  # fmt: skip
        rate, p99 = statistics.median(one["rate"] for one in own), statistics.median(one["p99"] for one in own)
        modelled = closed(costs, connections)
        rows.append(
            [
                connections, f"{rate:.0f}", f"{modelled[0]:.0f}", f"{modelled[0] / rate:.2f}",
                f"{p99:.1f}", f"{1000 * modelled[2]:.1f}", f"{1000 * modelled[2] / p99:.2f}",
            ]
        )  # fmt: skip
    heads = ["connections", "requests/s", "model", "ratio", "p99, ms", "model", "ratio"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def day(costs: Costs, curve: Curve, mean: float) -> list[str]:
    """One day; returns the cells of its row."""
    load = trace(mean)
    scaler = Autoscaler(load[0] / curve.capacity / 0.6)
    backlog = refused = answered = 0.0
    machines: list[float] = []
    slow = 0
    for step, arriving in enumerate(load):
        now = step * STEP
        ready = scaler.ready(now)
        if now == DAY / 2:
            ready = scaler.lose(now, ready // ZONES)
        capacity = ready * curve.capacity
        if now % (DAY / SWAPS) < SWAP_SECONDS:
            capacity *= (costs.cores - 1) / costs.cores
        if DAY / 4 <= now < DAY / 4 + 3600:
            capacity /= 1 + CANARY
        backlog += (arriving - capacity) * STEP
        if backlog > QUEUE_SECONDS * capacity:
            refused += backlog - QUEUE_SECONDS * capacity
            backlog = QUEUE_SECONDS * capacity
        backlog = max(0.0, backlog)
        share = min(arriving / capacity, AT[-1])
        waits = backlog / capacity
        slow += waits + float(np.interp(share, AT, curve.p99)) > SLOW_SECONDS
        answered += arriving * STEP
        waiting = backlog / ready + float(np.interp(share, AT, curve.waiting))
        scaler.see(now, 1.0 if backlog else min(1.0, arriving / capacity), waiting)
        machines.append(scaler.paid(now))
    hours = sum(machines) * STEP / 3600
    dollars = hours * costs.cores * CORE_HOUR / ((answered - refused) / 1e6)
    return [
        f"{statistics.mean(machines):.1f}", f"{max(machines):.0f}", f"{refused / answered:.2e}", f"{slow / len(load):.4f}", f"{dollars:.3f}",
    ]  # fmt: skip


def trace(mean: float) -> NDArray[np.float64]:
    """Predictions a second in each step: the time of day, bursts, and the noise of independent arrivals."""
    rng = np.random.default_rng(0)
    at = np.arange(0, DAY, STEP)
    load = mean * (1 + SWING * np.sin(2 * np.pi * (at / DAY - 0.25)))
    for began in rng.uniform(0, DAY - BURST_SECONDS, BURSTS):
        load[(at >= began) & (at < began + BURST_SECONDS)] *= BURST
    return np.maximum(0, load + rng.normal(size=len(at)) * np.sqrt(load / STEP))


class Autoscaler:
    """Kubernetes' autoscaler with the configuration of deploy/kubernetes."""

    def __init__(self, first: float):
        spec = yaml.safe_load((ROOT / "deploy/kubernetes/autoscaler.yaml").read_text())["spec"]
        cpu, waiting = spec["metrics"]
        self._busy = cpu["resource"]["target"]["averageUtilization"] / 100
        self._target = float(waiting["pods"]["target"]["averageValue"])
        self._least = spec["minReplicas"]
        [up] = spec["behavior"]["scaleUp"]["policies"]
        self._growth, self._period = 1 + up["value"] / 100, up["periodSeconds"]
        self._window = spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"]
        self._count = max(self._least, math.ceil(first))  # that are ready
        self._coming: list[tuple[float, int]] = []  # when, how many
        self._wished: list[tuple[float, int]] = []
        self._grown = -math.inf
        self._seen = -math.inf

    def ready(self, now: float) -> int:
        """Machines that answer."""
        self._count += sum(count for at, count in self._coming if at <= now)
        self._coming = [one for one in self._coming if one[0] > now]
        return self._count

    def paid(self, now: float) -> int:
        """Machines that run, also those that do not answer yet."""
        return self._count + sum(count for _, count in self._coming)

    def lose(self, now: float, count: int) -> int:
        """A zone fails: its machines are replaced at once, and answer after their start."""
        self._count -= count
        self._coming.append((now + COLD_SECONDS, count))
        return self._count

    def see(self, now: float, busy: float, waiting: float) -> None:
        """Look at a machine every 15 seconds: the share of its cores that is busy, and how many requests wait."""
        if now - self._seen < 15:
            return
        self._seen = now
        there = self.paid(now)
        ratio = max(busy / self._busy, waiting / self._target)
        wish = there if abs(ratio - 1) <= 0.1 else math.ceil(there * ratio)
        wish = max(self._least, wish)
        self._wished = [one for one in self._wished if one[0] > now - self._window] + [(now, wish)]
        if wish > there and now - self._grown >= self._period:
            self._grown = now
            self._coming.append((now + COLD_SECONDS, min(wish, math.ceil(there * self._growth)) - there))
        elif (least := max(wished for _, wished in self._wished)) < there and not self._coming:
            self._count = least


def assumptions() -> str:
    spec = yaml.safe_load((ROOT / "deploy/kubernetes/autoscaler.yaml").read_text())["spec"]
    cpu, pods = spec["metrics"]
    target, busy = pods["pods"]["target"]["averageValue"], cpu["resource"]["target"]["averageUtilization"]
    return (
        f"Assumptions. A machine has two cores, as in the load test; {CORE_HOUR} dollars for a core and hour. The load is {SWING:.0%} above its mean at noon and as much below at midnight, with {BURSTS} bursts of "
        f"{BURST:g} times the load for {BURST_SECONDS:.0f} s. At noon one of {ZONES} zones fails. A machine answers {COLD_SECONDS:.0f} s after it is wished for. Every six hours a new version is loaded by all machines at once, which takes "
        f"one core for {SWAP_SECONDS:.0f} s; for an hour {CANARY:.0%} of the rows run twice (canary and shadow). The autoscaler wishes for cores that are {busy} % busy and for at most {target} waiting requests a machine, looks every 15 s, doubles within 30 s, and shrinks after 300 s; its limit on the number of machines does not count here. "
        f"What would wait longer than {QUEUE_SECONDS:g} s is refused. `cascade` runs {12 * USED:.2f} of 12 members for a row (benchmarks/results/cascade.md) and takes the Python of `average`; its queue has one stage here. "
        "Machines are alike and share the load evenly, so that one of them, with arrivals at random, stands for all."
    )


if __name__ == "__main__":
    main()
