"""How an ensemble's answers compare with the labels: a reliability diagram, and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest

from models_store.manifest import ECE_BINS
from models_store.uncertainty import Prediction
from training.members import metrics

ANNOTATED = 20  # classes up to which each cell of a confusion matrix is labelled with its count


def reliability(prediction: Prediction, labels: NDArray[np.integer], title: str) -> Figure:
    """Accuracy against confidence in the bins of the ECE, with exact 95 % intervals, and the answers in each bin."""
    right = prediction.label == labels
    edges = np.linspace(0, 1, ECE_BINS + 1)
    # The upper edge belongs to a bin, as in the ECE.
    bins = np.clip(np.ceil(prediction.confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    counts = np.bincount(bins, minlength=ECE_BINS)
    correct = np.bincount(bins, right, ECE_BINS).astype(int)
    used = np.flatnonzero(counts)
    accuracy = correct[used] / counts[used]
    intervals = [binomtest(correct[b], counts[b]).proportion_ci(0.95) for b in used]
    below = [a - interval.low for a, interval in zip(accuracy, intervals, strict=True)]
    above = [interval.high - a for a, interval in zip(accuracy, intervals, strict=True)]
    centres = (edges[:-1] + edges[1:]) / 2
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(centres[used], accuracy, 1 / ECE_BINS, edgecolor="white", label="answers")
    top.errorbar(
        centres[used],
        accuracy,
        [below, above],
        fmt="none",
        ecolor="black",
        capsize=2,
        linewidth=1,
        label="95 % interval",
    )
    top.plot([0, 1], [0, 1], "--", color="C1", linewidth=1.5, label="perfectly calibrated")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    figure.suptitle(f"{title}: ECE {metrics.ece(prediction.mean_probs, labels):.4f}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    bottom.bar(centres, counts, 1 / ECE_BINS, edgecolor="white", color="grey")
    bottom.set(xlabel="confidence", ylabel="number of answers", yscale="symlog", ylim=(0, None))
    bottom.yaxis.set_major_formatter("{x:.0f}")
    return figure


def confusion(counts: NDArray[np.integer], classes: Sequence[str], title: str) -> Figure:
    """The confusion matrix (true class, predicted class), coloured by the share of the true class."""
    size = len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.45 * size, 5, 12))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if size <= ANNOTATED:
        for row in range(size):
            for column in np.flatnonzero(counts[row]):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    float(column), row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8
                )
    if size <= 3 * ANNOTATED:
        axes.set_xticks(range(size), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(size), classes, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(title)
    return figure
