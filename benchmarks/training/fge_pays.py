"""Does FGE pay? One budget of FGE against the same budget of plain training, paired by seed.

    python -m benchmarks.training.fge_pays search     settings below, seeds 0-2, validation split only
    python -m benchmarks.training.fge_pays final      what validation chose for each network, seeds 100-104, test split
    python -m benchmarks.training.fge_pays table      benchmarks/results/fge_pays.md

Both arms share their pre-training: the plain arm goes on with the plain schedule, the FGE arm turns to cycles. Given the
seed this is bit for bit what two separate trainings would compute, at 1.2 times the cost of one. Both arms get
re-estimated batch norm and a temperature fitted on validation. Every finished arm is kept in results/fge_pays.jsonl, so an
interrupted search goes on. The search budget is GRID, no more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from models_store.decisions import temperature
from models_store.uncertainty import combine, softmax
from training import data
from training.errors import DivergenceError
from training.fge import Config
from training.members import batch_norm
from training.members.export import Normalised, torch_logits
from training.members.metrics import score
from training.optimisation.loop import Leg
from training.optimisation.schedules import fge_rate, plain_rate
from training.optimisation.session import Session
from training.runs import Run, load_state

RESULTS = Path(__file__).parents[1] / "results"
LINES = RESULTS / "fge_pays.jsonl"
SEARCH_SEEDS, FINAL_SEEDS = (0, 1, 2), (100, 101, 102, 103, 104)
VALIDATION = 0.05  # of 60 000 images: 3000
METRICS = ("accuracy", "nll")


@dataclass(frozen=True)
class Base:
    """What both arms share."""

    network: str
    options: tuple[str, ...]
    limit: int
    epochs: int
    lr: float
    augment: str
    weight_decay: float = 3e-4

    @property
    def group(self) -> tuple:
        """Network and data: within a group, plain training may choose its rate and decay."""
        return self.network, self.options, self.limit, self.epochs, self.augment

    def config(self, seed: int, arm: Arm) -> Config:
        """Of the FGE arm."""
        return Config(
            dataset="fashion-mnist", network=self.network, network_options=self.options, limit=self.limit, epochs=self.epochs,
            lr=self.lr, augment=self.augment, weight_decay=self.weight_decay, seed=seed, pretrain=arm.pretrain,
            alpha_1=arm.alpha_1, members=arm.members, validation=VALIDATION,
        )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """How FGE spends what pre-training leaves."""

    pretrain: float
    alpha_1: float
    members: int


MLP = Base("mlp", (), 4000, 100, 0.05, "none")
RESNET = Base("preresnet8", (), 4000, 60, 0.1, "none")
# First round: the plain recipe of each network, FGE near the paper's.
FIRST = (Arm(0.8, 0.05, 4), Arm(0.8, 0.05, 10), Arm(0.8, 0.15, 6), Arm(0.6, 0.05, 10))
# Second round where the first showed a gain: larger rates, more cycles, a smaller share of plain training …
SECOND = (Arm(0.8, 0.3, 6), Arm(0.8, 0.3, 20), Arm(0.6, 0.3, 10), Arm(0.6, 0.15, 20), Arm(0.5, 0.3, 20))
# … and other rates and decays for the plain arm, lest FGE be praised for a rate that plain training could have had.
TUNED = tuple(
    dataclasses.replace(MLP, lr=rate, weight_decay=decay) for rate, decay in ((0.15, 3e-4), (0.3, 3e-4), (0.1, 3e-3))
)
# A larger decay won for plain training, so it may have more of it.
DECAYED = tuple(
    dataclasses.replace(MLP, lr=rate, weight_decay=decay)
    for rate, decay in ((0.05, 3e-3), (0.05, 1e-2), (0.1, 1e-2), (0.05, 3e-2), (0.2, 3e-3))
)
GRID = (
    (MLP, FIRST),
    (RESNET, FIRST),
    (dataclasses.replace(RESNET, augment="auto"), FIRST),
    (MLP, SECOND),
    (dataclasses.replace(MLP, options=("hidden=1024",)), SECOND),
    *((base, (Arm(0.8, 0.15, 6), Arm(0.6, 0.15, 20), Arm(0.6, 0.3, 10))) for base in TUNED),
    *((base, (Arm(0.8, 0.15, 6), Arm(0.6, 0.15, 20))) for base in DECAYED),
    (RESNET, (Arm(0.6, 0.1, 10), Arm(0.5, 0.1, 20))),
)


def main(phase: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    if phase == "search":
        for base, arms in GRID:
            for seed in SEARCH_SEEDS:
                measure(base, arms, seed, ("validation",))
    elif phase == "final":
        for row in chosen():
            for seed in FINAL_SEEDS:
                measure(row.base, (row.arm,), seed, ("validation", "test"))
                if row.rival != row.base:
                    measure(row.rival, (), seed, ("validation", "test"))
    elif phase == "table":
        (RESULTS / "fge_pays.md").write_text(report())
        print(report())
    else:
        raise SystemExit(__doc__)


def measure(base: Base, arms: tuple[Arm, ...], seed: int, splits: tuple[str, ...]) -> None:
    """Train what is not kept yet, a line an arm."""
    have = {
        (line["arm"] and Arm(**line["arm"]))
        for line in lines()
        if line["base"] == _plain(base) and line["seed"] == seed
    }
    todo = [arm for arm in (None, *arms) if arm not in have]
    if not todo:
        return
    config = base.config(seed, arms[0] if arms else FIRST[0])
    session = Session.open(config)
    steps = session.steps_per_epoch
    total = config.epochs * steps
    cuts = sorted({round(arm.pretrain * config.epochs) for arm in arms})
    with tempfile.TemporaryDirectory() as folder:
        shared = Run(Path(folder) / "plain", "plain")
        plain = Leg(
            "plain", total, lambda i: plain_rate(i, total, config.lr), collect=(total,),
            keep=tuple((cut, shared.start_file(f"epoch-{cut}")) for cut in cuts),
        )  # fmt: skip
        try:
            seconds = session.train(shared, [plain])
        except DivergenceError:  # then there is nothing to start the cycles from either
            for arm in todo:
                keep(base, arm, seed, 0.0, {"diverged": True})
            return
        if None in todo:
            keep(
                base,
                None,
                seed,
                seconds,
                scores(session, [load_state(shared.vertex_file(0, 0))], splits),
            )
        for arm in filter(None, todo):
            arm_config = base.config(seed, arm)
            cycle, collect = arm_config.cycles(steps)
            start = shared.start_file(f"epoch-{arm_config.pretrain_epochs}")
            run = Run(Path(folder) / str(arm), "fge")
            # Leg 1 of an FGE run: an idle first leg keeps the epochs' seeds those of the method.
            legs = [
                Leg("idle", 0, lambda i: 0.0),
                Leg("fge", collect[-1], _cyclic(cycle, arm_config), start=start, collect=collect),
            ]
            try:
                of_arm = dataclasses.replace(session, config=arm_config, network=session.initialised())
                seconds = of_arm.train(run, legs)
            except DivergenceError:
                keep(base, arm, seed, 0.0, {"diverged": True})
                continue
            states = [load_state(run.vertex_file(1, index)) for index in range(len(collect))]
            keep(base, arm, seed, seconds, scores(of_arm, states, splits))


def _cyclic(cycle, config):
    return lambda i: fge_rate(i, cycle, config.alpha_1, config.alpha_2)


def scores(session: Session, states, splits: tuple[str, ...]) -> dict:
    """On the splits, at the temperature that validation fits; the mean member beside the average."""
    network, found = session.network, session.data
    arrays = {name: data.as_arrays(getattr(found, name)) for name in splits}
    logits = {name: [] for name in splits}
    for state in states:
        network.load_state_dict(state)
        served = Normalised(network, found.mean, found.std)
        order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))[: session.config.bn_images]
        batch_norm.reestimate(network, (served.normaliser(i) for i, _ in found.train.batches(order, 500)))
        for name, (images, _) in arrays.items():
            logits[name].append(torch_logits(served, images, session.fabric.device))
    weights = np.full(len(states), 1 / len(states))
    fitted = temperature.fit(np.stack(logits["validation"]), arrays["validation"][1], weights)
    record = {"members": len(states), "temperature": fitted}
    for name, (_, labels) in arrays.items():
        probs = softmax(np.stack(logits[name]), fitted)
        record[name] = score(combine(probs, weights).mean_probs, labels).model_dump()
        record[f"{name}_member_accuracy"] = float(np.mean([score(p, labels).accuracy for p in probs]))
    return record


def chosen() -> list[Comparison]:
    """Of each network and data, the setting and metric with the largest paired t on validation, where FGE gained at all."""
    best: dict[tuple, Comparison] = {}
    for row in comparisons("validation", SEARCH_SEEDS):
        if row.gain > 0 and row.t > best.get(row.base.group, row._replace(t=0)).t:
            best[row.base.group] = row
    return list(best.values())


class Comparison(NamedTuple):
    """FGE minus plain, paired by seed and signed so that positive is better."""

    base: Base
    arm: Arm
    metric: str
    rival: Base  # the plain arm: of the same network and data, with the rate and decay that validation likes best
    plain: float
    fge: float
    gain: float
    half: float  # of the 95 % t-interval
    t: float


def comparisons(split: str, seeds: tuple[int, ...]) -> list[Comparison]:
    """Every FGE arm that was measured on all seeds against the best plain arm of its network and data."""
    kept: dict[tuple[Base, Arm | None], dict[int, dict]] = defaultdict(dict)
    for line in lines():
        arm = line["arm"] and Arm(**line["arm"])
        if not line.get("diverged"):
            kept[Base(**{**line["base"], "options": tuple(line["base"]["options"])}), arm][line["seed"]] = line
    rows: list[Comparison] = []
    for (base, arm), measured in kept.items():
        if arm is None or not all(split in measured.get(seed, ()) for seed in seeds):
            continue
        for metric in METRICS:
            sign = 1 if metric == "accuracy" else -1

            def mean(candidate: Base, metric=metric) -> float:
                return float(np.mean([kept[candidate, None][seed]["validation"][metric] for seed in SEARCH_SEEDS]))

            rivals = [
                b for b, a in kept if a is None and b.group == base.group and set(SEARCH_SEEDS) <= set(kept[b, None])
            ]
            rival = max(rivals, key=lambda b, sign=sign, mean=mean: sign * mean(b))
            if not all(split in kept[rival, None].get(seed, ()) for seed in seeds):
                continue
            plain = np.array([kept[rival, None][seed][split][metric] for seed in seeds])
            fge = np.array([measured[seed][split][metric] for seed in seeds])
            differences = sign * (fge - plain)
            error = float(differences.std(ddof=1) / np.sqrt(len(seeds)))
            half = float(stats.t.ppf(0.975, len(seeds) - 1) * error)
            gain = float(differences.mean())
            rows.append(
                Comparison(
                    base,
                    arm,
                    metric,
                    rival,
                    float(plain.mean()),
                    float(fge.mean()),
                    gain,
                    half,
                    gain / max(error, 1e-9),
                )
            )
    return rows


def report() -> str:
    """The table, losers included."""
    text = ["# FGE at 1B against plain training at 1B, Fashion-MNIST", ""]
    text += [
        f"Fixed on validation (seeds {SEARCH_SEEDS}), a setting and metric for each network and data where FGE gained:",
        "",
    ]
    fixed = chosen()
    text += [_table(fixed), ""]
    final = {row[:3]: row for row in comparisons("test", FINAL_SEEDS)}
    text += [f"## Test split, fresh seeds {FINAL_SEEDS}: paired difference with its 95 % t-interval", ""]
    kept = [final[row[:3]] for row in fixed if row[:3] in final]
    text += [_table(kept), ""]
    for row in fixed:
        if row[:3] not in final:
            text += [
                f"Not in the table, because it diverged on one of these seeds or was not run: {_name(row.base)}.",
                "",
            ]
    text += ["## The search: validation split, settings that lost included", ""]
    found = sorted(comparisons("validation", SEARCH_SEEDS), key=lambda row: (row.base.group, row.metric, -row.gain))
    diverged = sorted(
        {(line["base"]["network"], str(line["arm"]), line["seed"]) for line in lines() if line.get("diverged")}
    )
    trainings = sum(line["seed"] in SEARCH_SEEDS for line in lines())
    text += [f"Search budget: {trainings} arms trained, plain ones included.", ""]
    text += [_table(found), "", f"Diverged, and so not in the table: {diverged or 'none'}.", ""]
    return "\n".join(text)


def _table(rows: list[Comparison]) -> str:
    body = [
        [_name(r.base), _arm(r.arm), r.metric, f"{r.plain:.4f} (lr {r.rival.lr:g}, wd {r.rival.weight_decay:g})", f"{r.fge:.4f}",
         f"{r.gain:+.4f} ± {r.half:.4f}"]
        for r in rows
    ]  # fmt: skip
    headers = ["setting", "FGE", "metric", "best plain", "FGE", "gain (positive is better)"]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def _name(base: Base) -> str:
    return f"{base.network} {' '.join(base.options)} {base.limit} images, B={base.epochs}, augment {base.augment}, lr {base.lr:g}, wd {base.weight_decay:g}".replace(
        "  ", " "
    )


def _arm(arm: Arm) -> str:
    return f"{arm.pretrain:.0%} plain, α1 {arm.alpha_1:g}, {arm.members} members"


def lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def keep(base: Base, arm: Arm | None, seed: int, seconds: float, record: dict) -> None:
    line = {"base": _plain(base), "arm": arm and _plain(arm), "seed": seed, "seconds": round(seconds, 1), **record}
    with LINES.open("a") as file:
        file.write(json.dumps(line) + "\n")
    v = record.get("validation", {"accuracy": math.nan, "nll": math.nan})
    print(
        f"{time.strftime('%H:%M:%S')} {_name(base)} | {arm and _arm(arm)} | seed {seed}: val {v['accuracy']:.4f} {v['nll']:.4f}",
        flush=True,
    )


def _plain(record) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(record).items()}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
