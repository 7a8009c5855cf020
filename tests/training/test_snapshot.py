import pytest

from models_store.store import Store
from tests.training.conftest import SMALL
from training import snapshot
from training.errors import ConfigError
from training.runs import Run
from training.snapshot import Config


def plan(steps=10, **options):
    with Run.open("plan", {}, {}, fresh=True) as run:
        return snapshot.plan(Config(**options), run, steps)


def test_a_snapshot_is_taken_where_the_rate_is_lowest_and_then_it_starts_anew():
    (leg,) = plan(epochs=6, cycles=3, lr=0.2).legs
    assert leg.collect == (20, 40, 60)
    rates = [leg.rate(i) for i in range(1, 61)]
    assert [rates[i] for i in (0, 20, 40)] == pytest.approx([0.2] * 3)
    assert all(rates[i - 1] == min(rates) for i in leg.collect)
    assert rates[:20] == sorted(rates[:20], reverse=True)


def test_only_the_last_snapshots_of_each_run_become_members_if_told():
    legs = plan(epochs=6, cycles=3, members=2, runs=2).legs
    assert [leg.collect for leg in legs] == [(40, 60)] * 2


def test_what_does_not_fit_is_told():
    with pytest.raises(ConfigError, match="between 1 and --cycles"):
        Config(cycles=3, members=4)
    with pytest.raises(ConfigError, match="do not fit"):
        plan(steps=2, epochs=2, cycles=5)


def test_it_trains_and_publishes():
    version = snapshot.run(Config(name="s", epochs=2, cycles=2, runs=2, **SMALL))
    Store().verify(version)
    assert version.manifest.method == "snapshot"
    assert [m.origin.epoch for m in version.manifest.members] == [1, 2, 3, 4]
