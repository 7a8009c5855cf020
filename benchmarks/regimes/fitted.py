"""Where networks fit all their training images: FGE, snapshots, ESPRO and SWAG against independent networks and longer training.

    python -m benchmarks.regimes.fitted TASK [SEED …]     measure a task (fashion, cifar, rotations) for the seeds (default: all), a line each
    python -m benchmarks.regimes.fitted table             print and keep results/regimes.md

Fixed beforehand. preresnet8, no augmentation, batches of 64, B = 50 epochs, rate 0.1; 2000 images of Fashion-MNIST, or 2500 of CIFAR-10 as JPEG (found in $CIFAR10), as they are or
turned by 0, 90, 180 or 270 degrees, each angle with classes of its own (40 classes). The weight decay is the better of 3e-4 and 3e-3 by plain training on a seed of its own. FGE with the
paper's share and rates: 80 % of the plain schedule, cycles of 2 epochs, α1 0.05, α2 5e-4, 5 members. Alternatives (cycles of snapshots, rates of FGE and SWAG on a finished network, λ of ESPRO) are chosen by the
validation NLL of seed 0; the tables show 5000 test images, seeds 100, 101, 102, with paired 95 % t-intervals. A seed has three runs: at 1B each arm is the mean over them, at 3B their average.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.regimes.unpublished import Answers, Trainer, answers
from training import data, espro, fge, independent, snapshot, swag
from training.config import Config
from training.geometry.vertices import State
from training.optimisation.loop import Leg
from training.optimisation.schedules import fge_rate, plain_rate, snapshot_rate
from training.runs import load_weights

RESULTS = Path(__file__).parents[1] / "results"
LINES = RESULTS / "regimes.jsonl"
CHOOSING, CONFIRMING, DECAY_SEED = (0,), (100, 101, 102), 50
DECAYS = (3e-4, 3e-3)
B, RUNS, MORE = 50, 3, 3  # epochs; runs of a seed; further epochs of a finished network
TEST = 5000  # test images
SNAPSHOTS = (2, 5)
RATES = ((0.05, 5e-4), (0.01, 1e-4))  # of FGE on a finished network
LAMBDAS = (0.0, 1e-3, 0.1)
SAMPLES = 5  # networks of a simplex or a Gaussian


@dataclass(frozen=True)
class Task:
    """What is learnt."""

    dataset: str
    limit: int

    def options(self) -> dict[str, Any]:
        """Options of all methods."""
        return {
            "dataset": self.dataset.format(cifar=os.environ.get("CIFAR10", "cifar10")), "limit": self.limit, "network": "preresnet8",
            "augment": "none", "epochs": B, "lr": 0.1, "batch_size": 64, "bn_images": 2048, "validation": 0.02,
            **({"image_size": (32,)} if self.dataset.startswith("imagefolder") else {}),
        }  # fmt: skip


TASKS = {
    "fashion": Task("fashion-mnist", 2000),
    "cifar": Task("imagefolder:{cifar}", 2500),
    "rotations": Task("benchmarks.regimes.rotations:cifar", 2500),
}


class Measurement:
    """All arms of one task and seed."""

    def __init__(self, task: str, seed: int, decay: float, folder: Path):
        self.task, self.seed = task, seed
        self.options = {**TASKS[task].options(), "seed": seed, "weight_decay": decay}
        loaded = data.load(self.config(independent).data_options())
        some = torch.randperm(len(loaded.test), generator=torch.Generator().manual_seed(0))[:TEST]
        loaded = dataclasses.replace(loaded, test=loaded.test.take(some))
        self.trainer = Trainer(loaded, folder / f"{task}-{seed}-{decay:g}")
        self.steps = self.trainer.session(self.config(independent)).steps_per_epoch

    def config(self, method: Any, **options: Any) -> Config:
        """Options of a method."""
        return method.Config(**{**self.options, **options})

    def answers(self, states: list[State]) -> Answers:
        """Of the networks."""
        return answers(self.trainer.session(self.config(independent)), states)

    def plain(self) -> float:
        """Validation NLL of one network: to choose the decay."""
        states = self.trainer.train("decay", self.config(independent, runs=1), independent.plan)
        return self.answers(states).scores()["validation_nll"]

    def arms(self) -> dict[str, list[Answers]]:
        """By name, the networks of each run."""
        found: dict[str, list[Answers]] = {}
        plain, cycles, finished = self._shared()
        found["independent"] = [self.answers([state]) for state in plain]
        found["FGE"] = [self.answers(states) for states in cycles]
        longer = self.trainer.train("longer", self.config(independent, runs=1, epochs=2 * B), independent.plan)
        found["twice as long"] = [self.answers([state]) for state in longer]
        for count in SNAPSHOTS:
            config = self.config(snapshot, runs=RUNS, cycles=count)
            states = self.trainer.train(f"snapshots-{count}", config, snapshot.plan)
            found[f"snapshots, {count} cycles"] = [
                self.answers(states[run * count : (run + 1) * count]) for run in range(RUNS)
            ]
        for run, file in enumerate(finished):
            for name, of in self._further(run, file, found["independent"][run]).items():
                found.setdefault(name, []).append(of)
        return found

    def _shared(self) -> tuple[list[State], list[list[State]], list[Path]]:
        """Plain networks and FGE's members of each run; they share 80 % of the plain schedule."""
        config: Any = self.config(fge, cycle=2.0, members=5)
        session, run = self.trainer.session(config), self.trainer.run("shared")
        cycle, collect = config.cycles(self.steps)
        legs: list[Leg] = []
        for number in range(RUNS):
            cut = run.start_file(f"cut-{number}")
            legs.append(self._plain_leg(session, run, number, cut, config.pretrain_epochs))
            legs.append(
                Leg(
                    f"FGE {number + 1}",
                    collect[-1],
                    lambda i: fge_rate(i, cycle, config.alpha_1, config.alpha_2),
                    start=cut,
                    collect=collect,
                )
            )
        self.trainer.train_legs(run, session, legs)
        finished = [run.vertex_file(2 * number, 0) for number in range(RUNS)]
        cycles = [
            [load_weights(run.vertex_file(2 * number + 1, i)) for i in range(len(collect))] for number in range(RUNS)
        ]
        return [load_weights(file) for file in finished], cycles, finished

    def _plain_leg(self, session, run, number: int, cut: Path, at: int) -> Leg:
        start = run.start_file(f"fresh-{number}")
        self.trainer.start(start, session.initialised(number).state_dict())
        total = B * self.steps
        return Leg(
            f"plain {number + 1}",
            total,
            lambda i: plain_rate(i, total, 0.1),
            start=start,
            collect=(total,),
            keep=((at, cut),),
        )

    def _further(self, run: int, file: Path, base: Answers) -> dict[str, Answers]:
        """A finished network and 6 % of its cost."""
        found: dict[str, Answers] = {}
        total, seed = MORE * self.steps, self.seed * 10 + run

        def leg(name: str, rate: Callable[[int], float]) -> list[State]:
            config = self.config(independent, runs=1, seed=seed)
            session, own = self.trainer.session(config), self.trainer.run(f"{name}-{run}")
            self.trainer.train_legs(own, session, [Leg(name, total, rate, start=file, collect=(total,))])
            return [load_weights(own.vertex_file(0, 0))]

        def method(name: str, kind: Any, **options: Any) -> list[State]:
            return self.trainer.train(f"{name}-{run}", self.config(kind, seed=seed, **options), kind.plan, [file])

        found["6 % more, at the last rate"] = self.answers(leg("more", lambda i: 0.1 * 0.01))
        restarted = self.answers(leg("restart", lambda i: snapshot_rate(i, [total], 0.05)))
        found["6 % more, restarted"] = restarted
        found["6 % more, restarted, and the base"] = base.with_(restarted)
        for high, low in RATES:
            states = method(
                f"init-{high:g}", fge, init=(file,), epochs=MORE, cycle=1.0, alpha_1=high, alpha_2=low
            )  # the given network is the first
            found[f"6 % more, FGE α1 {high:g}"] = self.answers(states)
        for rate in (0.05, 0.01):
            gaussian = method(
                f"swag-{rate:g}", swag, init=(file,), epochs=MORE, every=0.5, swag_lr=rate, samples=SAMPLES
            )
            found[f"6 % more, SWAG {rate:g}"] = self.answers(gaussian)
        for weight in LAMBDAS:
            options = {"base": (str(file),), "vertices": 1, "vertex_epochs": MORE, "volume_weight": weight}
            states = method(f"espro-{weight:g}", espro, samples=SAMPLES, bank=0, **options)
            found[f"6 % more, ESPRO λ {weight:g}"] = self.answers(states)
        return found


def line(arms: dict[str, list[Answers]]) -> dict[str, dict[str, float]]:
    """Scores of each arm at 1B, the mean over its runs; of all runs together, and of the first two."""
    found: dict[str, dict[str, float]] = {}
    for name, runs in arms.items():
        each = [one.scores() for one in runs]
        found[f"{name} × 1"] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        for count in range(2, len(runs) + 1):
            found[f"{name} × {count}"] = runs[0].with_(*runs[1:count]).scores()
    return found


def lines() -> list[dict[str, Any]]:
    """What has been measured."""
    return [json.loads(one) for one in LINES.read_text().splitlines()] if LINES.exists() else []


def keep(record: dict[str, Any]) -> None:
    """Append a line, at once."""
    with LINES.open("a") as file:
        file.write(json.dumps(record) + "\n")


def measure(task: str, seeds: list[int]) -> None:
    """Measure what is missing."""
    folder = Path(os.environ.get("MODEPATH_RUNS") or "runs") / "regimes"
    decays = {row["decay"]: row["nll"] for row in lines() if row["task"] == task and row["seed"] == DECAY_SEED}
    for decay in DECAYS:
        if decay not in decays:
            decays[decay] = Measurement(task, DECAY_SEED, decay, folder).plain()
            keep({"task": task, "seed": DECAY_SEED, "decay": decay, "nll": decays[decay]})
    best = min(decays, key=lambda decay: decays[decay])
    for seed in seeds:
        if any(row["task"] == task and row["seed"] == seed for row in lines()):
            continue
        began = time.monotonic()
        found = line(Measurement(task, seed, best, folder).arms())
        keep({"task": task, "seed": seed, "decay": best, "seconds": round(time.monotonic() - began), "arms": found})
        print(time.strftime("%H:%M:%S"), task, seed, {name: round(of["test_error"], 4) for name, of in found.items()})


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[1] == "table":
        from benchmarks.regimes import report

        (RESULTS / "regimes.md").write_text(report.text())
        print(report.text())
        return
    measure(sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [*CHOOSING, *CONFIRMING])


if __name__ == "__main__":
    main()
