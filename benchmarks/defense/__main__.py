"""What a different network for each query costs an attacker, on Fashion-MNIST.

    python -m benchmarks.defense              train what is missing, attack, print and keep results/defense.md, defense.png
    python -m benchmarks.defense --seed 0     attack one training seed's networks and stop: one process a seed, at the same time
    python -m benchmarks.defense --smoke      the whole on digits with next to nothing of everything, kept in evaluation/

preresnet8, 6 epochs, two training seeds and 100 test images for each, other ones; clean errors are of all test images. Arms: one network; the mean of 6 points of a curve; `random` and `keyed` over that curve's bank of 64; one network with Gaussian noise
(σ 0.006) on its input, and `random` with 0.006; `random` over a simplex grown around the network, and over three independent networks; one network
trained adversarially on half of each batch at ε 2/255 for half as long again, which its accuracy bears, and one on all of it at the attacked ε.
The last three arms are attacked at one ε, with one budget and no surrogate. AutoAttack is its two APGD. Attacks see all digits of the probabilities (Square) or labels alone (HopSkipJump), know that answers may differ, and average m of
them; 1000 answers for each image, averaged ones counted (a surrogate's maker has 12 000 for all images). How many are averaged is chosen on one training seed and reported on
the other. What they found is asked again 100 times (of `keyed` across turns of its key): the mean error, and the share of images that most answers get wrong. Errors are of all test images taken, those that are wrong without
an attack included. ε is in L∞ of pixels in [0, 1].
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.defense import arms, blackbox, judging, parity, report, whitebox
from benchmarks.defense.attacks import VERSIONS, attack
from benchmarks.defense.recipes import ARMS, EPSILON, FASHION, SMOKE, Arm, Size
from models_store.store import Store
from training.measurement.probing import Kept
from training.optimisation import hardware

RESULTS = Path(__file__).parents[1] / "results"
FAR = 20 / 255  # HopSkipJump minimises the distance; what counts is what it found within this
AVERAGED = (1, 5, 20)
STEADY, SHORT = 5, (1, 5)  # answers averaged where ε varies, and where the budget does


def cells(size: Size) -> list[dict[str, Any]]:
    """What is measured."""
    budget, found = size.budget, list[dict[str, Any]]()

    def add(
        attack: str, arm: Arm, epsilon: float = EPSILON, m: int = 1, asked: int = budget, images: int = size.images
    ) -> None:
        place = {"arm": arm.label, "attack": attack, "epsilon": epsilon, "m": m, "budget": asked, "images": images}
        found.extend({"seed": seed, **place, "version": VERSIONS[attack.partition(",")[0]]} for seed in size.seeds)

    for arm in ARMS:
        random = arm.mode == "random" or arm.noise > 0
        add("none", arm)
        add("noise", arm)
        squares = ["square", "square, jittered"] if arm.mode == "keyed" else ["square"]

        def averaged(kind: str, among: Sequence[int], asked: int = budget, differ: bool = random) -> list[int]:
            return [m for m in among if 5 * m <= asked] if differ or kind.endswith("jittered") else [1]

        for kind in squares:
            for m in averaged(kind, AVERAGED):
                add(kind, arm, m=m)
                add(kind.replace("square", "hopskipjump"), arm, FAR, m)
        for kind in ("endpoint", "midpoint", "eot", "arc"):
            add(kind, arm)
        if not random and arm.mode != "keyed":
            add("autoattack", arm)
        else:
            add("pgd", arm)
        if arm.briefly:
            continue
        add("surrogate", arm)
        # For the figure: the same attacks of every arm at every ε and every budget.
        for epsilon in size.epsilons:
            add("eot", arm, epsilon)
            if epsilon == size.epsilons[-1]:
                continue  # there nothing is left by then
            for kind in squares:
                for m in averaged(kind, (STEADY,)):
                    add(kind, arm, epsilon, m)
        for asked in (budget // 10, budget * 3 // 10):
            for kind in squares:
                for m in averaged(kind, SHORT, asked):
                    add(kind, arm, m=m, asked=asked)
    return found


def question(size: Size) -> dict[str, Any]:
    """What the kept answers belong to: these networks."""
    versions = [
        size.version(of, seed) for of in ("networks", "path", "simplex", "hardened", "hardest") for seed in size.seeds
    ]
    return {"networks": [version.manifest.files for version in versions], "size": dataclasses.asdict(size)}


def clean(size: Size) -> list[dict[str, Any]]:
    """Where all test images are asked."""
    place = {"attack": "clean", "epsilon": 0.0, "m": 1, "budget": 0, "images": len(size.data.test)}
    return [
        {"seed": seed, "arm": arm.label, **place, "version": VERSIONS["clean"]} for arm in ARMS for seed in size.seeds
    ]


def fixed(size: Size, place: dict[str, Any]) -> dict[str, Any]:
    """The same attack where randomness is taken away: every query is answered by one point of the curve."""
    images, labels = size.test(place["images"], place["seed"])
    oracle = arms.fixed(Store(), size.version("path", place["seed"]).name, size.bank // 3)
    # As many steps as against `random`: it is the randomness that is taken away, not the doubt.
    oracle.repeats = False
    found = blackbox.square(oracle, images, labels, place["epsilon"], place["budget"], 1, seed=place["seed"])
    answers = oracle.answers / len(images)
    return {**judging.judged(oracle, found, labels, again=1), "answers": answers}


def transfer(size: Size, seed: int) -> list[list[float]]:
    """Errors of 11 points of the curve (columns) on what PGD finds at each of them (rows)."""
    version = size.version("path", seed)
    assert version.manifest.bank is not None
    numbers = np.linspace(0, version.manifest.bank.points - 1, 11).astype(int).tolist()
    models = whitebox.torch_points(version, size.data.mean, size.data.std, numbers)
    clean, labels = size.test(size.images, seed)
    found = [whitebox.pgd([model], clean, labels, EPSILON) for model in models]
    return [[whitebox.error(model, moved, labels) for model in models] for moved in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.defense", description="A different network for each query, attacked."
    )
    parser.add_argument("--smoke", action="store_true", help="digits, next to nothing of everything")
    parser.add_argument("--seed", type=int, help="attack this training seed's networks alone, and stop")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FASHION
    Store().check_writable("benchmark")
    hardware.keep_memory()
    by_label = {arm.label: arm for arm in ARMS}
    where = (RESULTS if size is FASHION else Path("evaluation")) / "defense"
    kept = Kept(where.with_suffix(".jsonl"), question(size))

    def measured(places: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        found = kept.measure(places, lambda place: attack(size, place, by_label[place["arm"]]), what)
        return [{**place, **values} for place, values in zip(places, found, strict=True)]

    if options.seed is not None:
        own = [cell for cell in [*clean(size), *cells(size)] if cell["seed"] == options.seed]
        measured(own, f"seed {options.seed}")
        return
    errors = report.errors(measured(clean(size), "clean"))
    off = report.unmatched(errors, {arm.label for arm in ARMS if arm.unmatched})
    if off and size is FASHION:
        raise SystemExit(
            f"clean errors are not matched within {100 * report.MATCHED:g} points: {off}. Change a recipe, or call the arm unmatched."
        )
    cells_ = measured(cells(size), "cells")
    common = {
        "arm": "fixed",
        "attack": "square",
        "images": size.images,
        "budget": size.budget,
        "epsilon": EPSILON,
        "m": 1,
    }
    without = [{"seed": seed, **common, "version": VERSIONS["square"]} for seed in size.seeds]
    frozen = kept.measure(without, functools.partial(fixed, size), "fixed")
    held = [{**place, **values} for place, values in zip(without, frozen, strict=True)]
    at = {"what": "transfer", "version": VERSIONS["pgd"]}
    matrix = kept.measure([at], lambda place: {"matrix": transfer(size, 0)}, "transfer")[0]["matrix"]
    asked = min(50, size.images)
    at = {"what": "http", "version": 2}
    http = kept.measure(
        [at],
        lambda place: parity.over_http(size.version("path", 0), *size.test(asked, 0), EPSILON, size.budget),
        "http",
    )[0]
    parity.check(http)
    together = report.Report(cells_, errors, EPSILON, FAR, size.budget)
    at_points = [f"{t:.1f}" for t in np.linspace(0, 1, 11)]
    text = [
        "# Another network for each query", (__doc__ or "").split("\n\n")[-1].strip(),
        "## Errors, %: mean when asked again (bootstrap, 95 %); lost by majority (Wilson, 95 %). ε 5/255; HopSkipJump's images within 20/255", together.summary(),
        "## More errors than of one network with noise, points, the same images (bootstrap, 95 %)", together.differences("one network, noise"),
        "## Is the evaluation honest?", "\n".join(together.checks(size.epsilons[-1])),
        f"Randomness taken away (one point of the curve answers all): Square reaches {report.shown(report.pooled(held))}.",
        parity.told(http), "## Transfer between points of the curve: error of t (column) on PGD's images of t (row), %",
        tabulate([[t, *(f"{100 * e:.0f}" for e in row)] for t, row in zip(at_points, matrix, strict=True)], ["t", *at_points], tablefmt="github", disable_numparse=True),
        "## Everything", together.everything(),
    ]  # fmt: skip
    report.figure(together, STEADY, SHORT, where.with_suffix(".png"))
    where.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
