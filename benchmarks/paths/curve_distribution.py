"""A distribution over curves: SWAG over the bend between two networks (Benton et al. 2021, section 4.1), beside SWAG around a network.

    python -m benchmarks.paths.curve_distribution      trains what is missing, prints and keeps results/curve_distribution.md

preresnet8 on 10 000 images of Fashion-MNIST; two networks of 20 epochs; then 40 epochs for the Gaussian over the bend (20 of them at its constant
rate), or 20 at the constant rate around each of the two networks; or two networks of 40 epochs each. 30 networks are drawn: in the first case each is a point, at a t of
its own, of a curve of its own. Cost in plain epochs, the two networks included. Seeds 0, 1, 2; test split; temperatures from validation.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.training.comparison import Arm, measure, spent, table
from models_store.store import Store, Version
from training import independent, swag
from training.measurement.probing import Kept

RESULTS = Path(__file__).parents[1] / "results"
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "limit": 10_000, "activate": False}
SEEDS = (0, 1, 2)


def ends(seed: int) -> Version:
    return independent.run(independent.Config(name=f"bends-ends-{seed}", seed=seed, epochs=20, runs=2, **COMMON))


def over(seed: int) -> Version:
    given = tuple(f"{ends(seed).name}/{i}" for i in (0, 1))
    options = {"endpoints": given, "epochs": 40, "start": 0.5, **COMMON}
    return swag.run(swag.Config(name=f"bends-over-{seed}", seed=seed, **options))


def around(seed: int) -> Version:
    # As many collections, and both networks: 20 epochs around each.
    given = tuple(Path(f"{ends(seed).name}/{i}") for i in (0, 1))
    return swag.run(swag.Config(name=f"bends-around-{seed}", seed=seed, init=given, epochs=20, samples=15, **COMMON))


def longer(seed: int) -> Version:
    return independent.run(independent.Config(name=f"bends-longer-{seed}", seed=seed, epochs=40, runs=2, **COMMON))


def _ends_cost(seed: int) -> float:
    return spent(ends(seed))


ARMS = [
    Arm("the two ends", ends, slice(None)),
    Arm("SWAG over the bend", over, slice(None), 1, _ends_cost),
    Arm("SWAG around both ends", around, slice(None), 1, _ends_cost),
    Arm("two networks, twice the epochs", longer, slice(None)),
]


def main() -> None:
    Store().check_writable("benchmark")
    kept = Kept(RESULTS / "curve_distribution.jsonl", {"common": COMMON, "arms": [arm.method for arm in ARMS]})
    found = kept.measure(SEEDS, lambda seed: measure(ARMS, seed), "seeds")
    text = ["# A distribution over curves", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    text += [f"Mean and standard deviation over seeds {list(SEEDS)}.", "", table(found, "fitted"), ""]
    (RESULTS / "curve_distribution.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
