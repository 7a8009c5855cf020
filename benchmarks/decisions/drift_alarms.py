"""Does the test of drift keep its rate of false alarms, and how soon does it find a change? Is estimated accuracy the true one?

    python -m benchmarks.decisions.drift_alarms NAME      a published, calibrated ensemble; writes results/drift.md

False alarms: 100 random divisions of the test split; 3000 images calibrate, the other 7000 arrive. Changes: after 1000 unchanged images of such a
division, images of one kind arrive in random order; the rows until the first alarm of any measure, over 20 divisions. One stream, as one worker sees
it; with several workers each sees its share. Index: population stability index of 1000 changed images. Estimated accuracy: the mean confidence on
corrupted images (1000 test images, 13 kinds, severities 1, 3, 5; training/measurement/corruptions.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

from models_store.decisions import drift
from models_store.decisions.drift import Bins, SequentialTest, stability_index
from models_store.graphs.runtime import EnsembleSession
from models_store.store import Store
from models_store.uncertainty import Floats
from training import data
from training.config import data_options
from training.measurement.corruptions import corrupted

RESULT = Path(__file__).parents[1] / "results/drift.md"
CALIBRATION, BEFORE, REPLAYS, DIVISIONS = 3000, 1000, 100, 20
SEVERITIES, CORRUPTED, STREAM = (1, 3, 5), 1000, 5000
Stream = dict[str, Floats]  # values of each measure


def take(values: Stream, rows: np.ndarray) -> Stream:
    """Some rows of each measure."""
    return {name: one[rows] for name, one in values.items()}


def tests(calibration: Stream, seed: int) -> dict[str, SequentialTest]:
    """A test of each measure."""
    return {name: SequentialTest(one, seed=seed) for name, one in calibration.items()}


def main() -> None:
    version = Store().resolve(sys.argv[1])
    images, labels = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test)
    session = EnsembleSession(version.folder, version.manifest)
    clean = drift.statistics(images, session.predict(images))
    alarms = dict.fromkeys(clean, 0)
    tested = 0
    for seed in range(REPLAYS):
        order = np.random.default_rng(seed).permutation(len(labels))
        for name, test in tests(take(clean, order[:CALIBRATION]), seed).items():
            alarms[name] += test.add(clean[name][order[CALIBRATION:]])
        tested += len(labels) - CALIBRATION
    lines = [
        "# Drift", "",
        f"`python -m benchmarks.decisions.drift_alarms {sys.argv[1]}`: {version.manifest.method}, {len(version.manifest.members)} members, {len(labels)} test images.", "",
        f"False alarms in {REPLAYS} replays without a change, {tested} rows: " + ", ".join(f"{name} {count}" for name, count in alarms.items())
        + f". At most {drift.FALSE_ALARMS:g} are expected in {drift.HORIZON} rows.", "",
    ]  # fmt: skip
    changed: dict[str, Stream] = {}
    accuracy: list[list[str]] = []
    for kind, severity, shifted in corrupted(images[:CORRUPTED], SEVERITIES):
        prediction = session.predict(shifted)
        changed[f"{kind}, severity {severity}"] = drift.statistics(shifted, prediction)
        true, estimated = float((prediction.label == labels[:CORRUPTED]).mean()), float(prediction.confidence.mean())
        accuracy.append([kind, str(severity), f"{true:.3f}", f"{estimated:.3f}", f"{estimated - true:+.3f}"])
        print(accuracy[-1], file=sys.stderr)
    for label, name in enumerate(version.manifest.classes):
        changed[f"class {name} is missing"] = take(clean, np.flatnonzero(labels != label))
    rows = [[name, *found(clean, stream)] for name, stream in changed.items()]
    predicted = session.predict(images)
    true, estimated = float((predicted.label == labels).mean()), float(predicted.confidence.mean())
    accuracy.insert(0, ["clean", "", f"{true:.3f}", f"{estimated:.3f}", f"{estimated - true:+.3f}"])
    lines += [
        "## Rows until an alarm", "",
        tabulate(rows, ["change", "found", "rows: median (most)", "first measure", "largest index"], tablefmt="github", disable_numparse=True), "",
        "## Estimated accuracy", "",
        tabulate(accuracy, ["images", "severity", "accuracy", "estimated", "error"], tablefmt="github", disable_numparse=True), "",
    ]  # fmt: skip
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


def found(clean: Stream, stream: Stream) -> list[str]:
    """How many of the divisions raise an alarm, after how many changed rows, by which measure; and the index."""
    delays: list[int] = []
    first: list[str] = []
    index: dict[str, float] = {}
    for seed in range(DIVISIONS):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(clean["novelty"]))
        calibration, before = take(clean, order[:CALIBRATION]), take(clean, order[CALIBRATION : CALIBRATION + BEFORE])
        rows = rng.permutation(len(stream["novelty"]))[:STREAM]
        alarms: dict[str, int] = {}
        for name, test in tests(calibration, seed).items():
            assert not test.add(before[name]), "a false alarm"
            values = stream[name][rows]
            alarms[name] = next((row + 1 for row in range(len(rows)) if test.add(values[row : row + 1])), len(rows) + 1)
            if not seed:
                bins = Bins(name, calibration[name])
                index[name] = stability_index(bins.calibration, bins.counts(values[:1000]))
        name = min(alarms, key=alarms.__getitem__)
        if alarms[name] <= len(rows):
            delays.append(alarms[name])
            first.append(name)
    most = max(index, key=index.__getitem__)
    if not delays:
        return ["0 of 20", "", "", f"{most} {index[most]:.2f}"]
    return [
        f"{len(delays)} of {DIVISIONS}",
        f"{np.median(delays):.0f} ({max(delays)})",
        max(set(first), key=first.count),
        f"{most} {index[most]:.2f}",
    ]


if __name__ == "__main__":
    main()
