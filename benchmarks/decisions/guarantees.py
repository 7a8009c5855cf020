"""Do the guarantees hold? Prediction sets and abstention over random divisions of a test split, and under corruptions.

    python -m benchmarks.decisions.guarantees NAME      a published, calibrated ensemble; writes results/decisions.md and decisions.png

Coverage: 20 random divisions of the test split into halves, one calibrates, the other is covered. The number of covered images is beta-binomial;
a cell counts the divisions outside of its 99 % interval. `average` is all members, `random` one member for each image.
Risk: 200 random divisions, 3000 images calibrate; a violation is a share of wrong answers above the risk on the other 7000.
Corruptions: the version's own calibration, 13 kinds (training/measurement/corruptions.py), 1000 images; means over the kinds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from models_store.decisions import abstention, conformal
from models_store.graphs.runtime import EnsembleSession
from models_store.store import Store
from models_store.uncertainty import combine, softmax
from training import data
from training.config import data_options
from training.measurement import decisions, shift

RESULTS = Path(__file__).parents[1] / "results"
COVERAGES, RISKS, SEVERITIES = (0.8, 0.9, 0.95, 0.99), (0.01, 0.02, 0.05, 0.1), (1, 3, 5)
IMAGES = 1000  # that are corrupted


def main() -> None:
    version = Store().resolve(sys.argv[1])
    images, labels = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test)
    session = EnsembleSession(version.folder, version.manifest)
    outputs = session.run_in_batches(images)
    logits, average = outputs.logits, session.combine(session.probs(outputs.logits), outputs.novelty)
    alone = np.stack([softmax(z, m.temperature) for z, m in zip(logits, version.manifest.members, strict=True)])
    chosen = np.random.default_rng(0).integers(len(alone), size=len(labels))
    ways = {"average": average.mean_probs, "random": alone[chosen, np.arange(len(labels))]}
    text = [
        "# What decisions guarantee", "",
        f"`python -m benchmarks.decisions.guarantees {sys.argv[1]}`: {len(alone)} members, {len(labels)} test images, accuracy {(average.label == labels).mean():.4f}.", "",
        "## Coverage over 20 divisions", "", coverage(ways, labels), "",
        "## Risk over 200 divisions", "", risk(average, labels), "",
        *shift.as_markdown(shift.measure(version, session, images[:IMAGES], labels[:IMAGES], SEVERITIES)),
    ]  # fmt: skip
    (RESULTS / "decisions.md").write_text("\n".join(text))
    figure(average, alone[best(version)], labels).savefig(RESULTS / "decisions.png", dpi=150)
    print("\n".join(text))


def best(version) -> int:
    """The member that is best on validation."""
    return max(range(len(version.manifest.members)), key=lambda k: version.manifest.members[k].validation.accuracy)


def coverage(ways: dict[str, np.ndarray], labels: np.ndarray) -> str:
    rows = []
    count, classes = len(labels) // 2, ways["average"].shape[1]
    for way, probs in ways.items():
        u = np.random.default_rng(1).random(len(labels))
        for method in conformal.METHODS:
            values = conformal.scores(probs, method, u)
            own = values[np.arange(len(labels)), labels]
            for level in COVERAGES:
                shares, outside, outside_classes, of = [], 0, 0, 0
                for seed in range(20):
                    order = np.random.default_rng(seed).permutation(len(labels))
                    first, second = order[:count], order[count:]
                    covered = own[second] <= conformal.threshold(np.sort(own[first]), level)
                    shares.append(covered.mean())
                    outside += _outside(covered.sum(), len(second), count, level)
                    limits = conformal.thresholds_by_class(own[first], labels[first], classes, level)
                    covered = own[second] <= limits[labels[second]]
                    for label in range(classes):
                        among = labels[second] == label
                        n = int((labels[first] == label).sum())
                        outside_classes += _outside(covered[among].sum(), int(among.sum()), n, level)
                        of += 1
                rows.append(
                    [way, method, f"{level:g}", f"{np.mean(shares):.4f} ({min(shares):.4f} to {max(shares):.4f})", f"{outside} of 20", f"{outside_classes} of {of}"]
                )  # fmt: skip
    headers = [
        "mode",
        "sets",
        "coverage",
        "covered: mean (least to most)",
        "outside of 99 %",
        "per class: outside of 99 %",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _outside(covered: int, rows: int, count: int, level: float) -> bool:
    rank = int(np.ceil((count + 1) * level - 1e-9))
    low, high = stats.betabinom(rows, rank, count + 1 - rank).interval(0.99)
    return not low <= covered <= high


def risk(average, labels: np.ndarray) -> str:
    wrong = average.label != labels
    rows = []
    for level in RISKS:
        violated, answered, share, none = 0, [], [], 0
        for seed in range(200):
            order = np.random.default_rng(seed).permutation(len(labels))
            first, second = order[:3000], order[3000:]
            found = abstention.threshold(average.confidence[first], wrong[first], level)
            if found is None:
                none += 1
                continue
            given = average.confidence[second] > found.confidence
            answered.append(given.mean())
            share.append(wrong[second][given].mean())
            violated += share[-1] > level
        allowed = int(stats.binom.ppf(0.99, 200, 1 - abstention.CONFIDENCE))
        means = (f"{np.mean(answered):.4f}", f"{np.mean(share):.4f}") if answered else ("", "")
        rows.append([f"{level:g}", *means, f"{violated} of 200", f"{allowed}", none])
    headers = [
        "risk",
        "answered",
        "wrong among them",
        "violated",
        f"99 % limit at {1 - abstention.CONFIDENCE:.2f}",
        "no threshold",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def figure(average, alone: np.ndarray, labels: np.ndarray) -> Figure:
    """Accuracy against the share of answers given."""
    single = combine(alone[None], np.ones(1))
    drawn = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawn.subplots()
    for name, prediction, score in (
        ("ensemble, by confidence", average, average.confidence),
        ("ensemble, by mutual information", average, -average.mutual_information),
        ("one network, by confidence", single, single.confidence),
        ("one network, by entropy", single, -single.predictive_entropy),
    ):
        share, errors = decisions.curve(score, prediction.label != labels)
        axes.plot(100 * share, 100 * (1 - errors), label=name)
    axes.set(xlabel="answers given, %", ylabel="accuracy of the answers given, %", xlim=(20, 100), ylim=(91, 100.1))
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.suptitle("Abstention on Fashion-MNIST's test split")
    return drawn


if __name__ == "__main__":
    main()
