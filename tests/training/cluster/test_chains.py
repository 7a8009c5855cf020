from pathlib import Path

from training import curve, espro, fge, independent, snapshot, swag
from training.cluster.chains import chains
from training.optimisation.loop import Leg
from training.runs import Run


def leg(start=None, keep=()):
    return Leg(label="a", iterations=1, rate=lambda i: 0.1, start=start and Path(start), keep=tuple((1, Path(one)) for one in keep))  # fmt: skip


def of(module, **options):
    config = module.Config(**options)
    with Run.open("plan", {}, {}, fresh=True) as run:
        return chains(module.plan(config, run, 10).legs)


def test_a_leg_without_a_start_follows_the_one_before_it():
    assert chains([leg("a"), leg(), leg("b"), leg()]) == [[0, 1], [2, 3]]
    assert chains([]) == []
    assert chains([leg()]) == [[0]]


def test_a_leg_depends_on_the_one_that_keeps_its_start():
    assert chains([leg("a", keep=("x", "y")), leg("b"), leg("y"), leg("x")]) == [[0, 2, 3], [1]]


def test_runs_of_every_method_are_chains_of_their_own():
    assert of(independent, runs=3) == [[0], [1], [2]]
    assert of(fge, epochs=10, runs=2) == [[0, 1], [2, 3]]
    assert of(snapshot, epochs=10, runs=2) == [[0], [1]]
    assert len(of(swag, epochs=10, runs=2)) == 2
    assert of(fge, epochs=20, starts=(12, 14, 16), members=2) == [[0, 1, 2, 3]]
    assert of(curve, epochs=10) == [[0], [1, 2]]
    assert of(espro, epochs=10, runs=2) == [[0], [1, 2, 3, 4, 5, 6, 7]]
