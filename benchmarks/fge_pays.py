"""Does FGE pay? One budget of FGE against the same budget of plain training, paired by seed.

    python -m benchmarks.fge_pays search     settings below, seeds 0-2, validation split only
    python -m benchmarks.fge_pays final      the setting and metric that validation chose, seeds 100-104, test split
    python -m benchmarks.fge_pays table      benchmarks/results/fge_pays.md

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from models_store.uncertainty import combine, softmax
from training import batch_norm, data, hardware, loop, networks, temperature
from training.errors import DivergenceError
from training.export import Normalised, torch_logits
from training.fge import Config
from training.loop import Leg
from training.metrics import score
from training.runs import Run, load_state
from training.schedules import fge_rate, plain_rate

RESULTS = Path(__file__).parent / "results"
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
BASES = (
    MLP,
    Base("preresnet8", (), 4000, 60, 0.1, "none"),
    Base("preresnet8", (), 4000, 60, 0.1, "auto"),
    Base("vgg16", ("width=0.25",), 4000, 60, 0.05, "auto", 5e-4),
)
ARMS = (Arm(0.8, 0.05, 4), Arm(0.8, 0.05, 10), Arm(0.8, 0.15, 6), Arm(0.6, 0.05, 10))
# A second round where the first showed a gain: larger rates, more cycles, a smaller share of plain training.
MORE = (Arm(0.8, 0.3, 6), Arm(0.8, 0.3, 20), Arm(0.6, 0.3, 10), Arm(0.6, 0.15, 20), Arm(0.5, 0.3, 20))
GRID = (*((base, ARMS) for base in BASES), (MLP, MORE), (Base("mlp", ("hidden=1024",), 4000, 100, 0.05, "none"), MORE))


def main(phase: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    if phase == "search":
        for base, arms in GRID:
            for seed in SEARCH_SEEDS:
                measure(base, arms, seed, ("validation",))
    elif phase == "final":
        base, arm, _ = chosen()
        for seed in FINAL_SEEDS:
            measure(base, (arm,), seed, ("validation", "test"))
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
    config = base.config(seed, arms[0])
    fabric = hardware.launch(config)
    found = data.load(config.data_options(), lambda line: None)
    steps = loop.iterations_per_epoch(found, config.batch_size)
    total = config.epochs * steps
    cuts = sorted({round(arm.pretrain * config.epochs) for arm in arms})
    with tempfile.TemporaryDirectory() as folder:
        shared = Run(Path(folder) / "plain", "plain")
        plain = Leg(
            "plain", total, lambda i: plain_rate(i, total, config.lr), collect=(total,),
            keep=tuple((cut, shared.start_file(f"epoch-{cut}")) for cut in cuts),
        )  # fmt: skip
        seconds, network = _train(config, fabric, shared, found, [plain])
        if None in todo:
            keep(
                base,
                None,
                seed,
                seconds,
                scores(network, [load_state(shared.vertex_file(0, 0))], found, config, fabric, splits),
            )
        for arm in filter(None, todo):
            arm_config = base.config(seed, arm)
            cycle, collect = arm_config.cycles(steps)
            start = shared.start_file(f"epoch-{arm_config.pretrain_epochs}")
            run = Run(Path(folder) / str(arm), "fge")
            # Leg 1 of an FGE run: an idle first leg keeps the epochs' seeds those of the door.
            legs = [
                Leg("idle", 0, lambda i: 0.0),
                Leg("fge", collect[-1], _cyclic(cycle, arm_config), start=start, collect=collect),
            ]
            try:
                seconds, network = _train(arm_config, fabric, run, found, legs)
            except DivergenceError:
                keep(base, arm, seed, 0.0, {"diverged": True})
                continue
            states = [load_state(run.vertex_file(1, index)) for index in range(len(collect))]
            keep(base, arm, seed, seconds, scores(network, states, found, config, fabric, splits))


def _cyclic(cycle, config):
    return lambda i: fge_rate(i, cycle, config.alpha_1, config.alpha_2)


def _train(config, fabric, run, found, legs):
    loop.initialise(config.seed)
    network = networks.build(config.network, len(found.classes), found.shape, config.network_kwargs())
    return loop.train(config, fabric, run, network, found, legs), network


def scores(network, states, found, config, fabric, splits: tuple[str, ...]) -> dict:
    """On the splits, at the temperature that validation fits; the mean member beside the average."""
    arrays = {name: data.as_arrays(getattr(found, name)) for name in splits}
    logits = {name: [] for name in splits}
    for state in states:
        network.load_state_dict(state)
        served = Normalised(network, found.mean, found.std)
        order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))[: config.bn_images]
        batch_norm.reestimate(network, ((i - served.mean) / served.std for i, _ in found.train.batches(order, 500)))
        for name, (images, _) in arrays.items():
            logits[name].append(torch_logits(served, images, fabric.device))
    weights = np.full(len(states), 1 / len(states))
    fitted = temperature.fit(np.stack(logits["validation"]), arrays["validation"][1], weights)
    record = {"members": len(states), "temperature": fitted}
    for name, (_, labels) in arrays.items():
        probs = softmax(np.stack(logits[name]), fitted)
        record[name] = score(combine(probs, weights).mean_probs, labels).model_dump()
        record[f"{name}_member_accuracy"] = float(np.mean([score(p, labels).accuracy for p in probs]))
    return record


def chosen() -> tuple[Base, Arm, str]:
    """Setting and metric with the largest paired t on validation; ties and losers are in the table."""
    return max(comparisons("validation", SEARCH_SEEDS), key=lambda row: row[3]["t"])[:3]


def comparisons(split: str, seeds: tuple[int, ...]) -> list[tuple[Base, Arm, str, dict]]:
    """FGE minus plain by seed, signed so that positive is better."""
    kept = lines()
    rows = []
    for base_record, arm_record in {
        (json.dumps(line["base"]), json.dumps(line["arm"])) for line in kept if line["arm"]
    }:
        base, arm = json.loads(base_record), json.loads(arm_record)
        for metric in METRICS:
            sign = 1 if metric == "accuracy" else -1
            pairs = []
            for seed in seeds:
                at = [line for line in kept if line["base"] == base and line["seed"] == seed]
                plain = [line[split][metric] for line in at if line["arm"] is None]
                # An arm that diverged on a seed lost; it has no mean.
                fge = [line[split][metric] for line in at if line["arm"] == arm and split in line]
                if plain and fge:
                    pairs.append((plain[0], fge[0]))
            if len(pairs) < len(seeds):
                continue
            differences = np.array([sign * (f - p) for p, f in pairs])
            error = differences.std(ddof=1) / np.sqrt(len(differences))
            half = stats.t.ppf(0.975, len(differences) - 1) * error
            summary = {
                "plain": float(np.mean([p for p, _ in pairs])), "fge": float(np.mean([f for _, f in pairs])),
                "gain": float(differences.mean()), "half": float(half), "t": float(differences.mean() / max(error, 1e-9)),
            }  # fmt: skip
            rows.append((Base(**{**base, "options": tuple(base["options"])}), Arm(**arm), metric, summary))
    return rows


def report() -> str:
    """The whole table, losers included."""
    base, arm, metric = chosen()
    text = ["# FGE at 1B against plain training at 1B, Fashion-MNIST", ""]
    text += [f"Chosen on validation (seeds {SEARCH_SEEDS}): {_name(base)}, {_arm(arm)}, metric {metric}.", ""]
    final = [row for row in comparisons("test", FINAL_SEEDS) if row[:2] == (base, arm)]
    if final:
        text += [f"## Test split, fresh seeds {FINAL_SEEDS}: paired difference with its 95 % t-interval", ""]
        text += [_table(final), ""]
    text += ["## The search: validation split, settings that lost included", ""]
    found = sorted(comparisons("validation", SEARCH_SEEDS), key=lambda row: (_name(row[0]), row[2], -row[3]["gain"]))
    return "\n".join([*text, _table(found), ""])


def _table(rows) -> str:
    body = [
        [_name(b), _arm(a), m, f"{s['plain']:.4f}", f"{s['fge']:.4f}", f"{s['gain']:+.4f} ± {s['half']:.4f}"]
        for b, a, m, s in rows
    ]
    headers = ["setting", "FGE", "metric", "plain", "FGE", "gain (positive is better)"]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def _name(base: Base) -> str:
    return (
        f"{base.network} {' '.join(base.options)} {base.limit} images, B={base.epochs}, augment {base.augment}".replace(
            "  ", " "
        )
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
