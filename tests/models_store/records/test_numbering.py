import itertools
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from models_store.errors import CorruptionError
from models_store.store import Store
from tests.models_store.faults import in_processes, kill_before
from tests.onnx_members import publish

NAMES = st.sampled_from(["a", "a.b"])


def _publish(root, name, seed, activate=True):
    os.fsync = lambda descriptor: None  # only in this process, which exits afterwards
    publish(Store(root), name, seeds=(seed,), activate=activate)


class Numbers(RuleBasedStateMachine):
    """Publications, some killed and some concurrent, between removals: a number always refers to the same version."""

    def __init__(self):
        super().__init__()
        self.fsync = mock.patch("os.fsync")  # no test here depends on what survives a power failure
        self.fsync.start()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "store")
        self.seeds = itertools.count()
        self.known = {}  # (name, number) -> digest, of all versions that ever existed

    def teardown(self):
        self.folder.cleanup()
        self.fsync.stop()

    @rule(name=NAMES)
    def publish(self, name):
        publish(self.store, name, seeds=(next(self.seeds),))

    @rule(name=NAMES, call=st.integers(0, 110))
    def killed(self, name, call):
        kill_before(call, _publish, self.store.root, name, next(self.seeds))

    @rule(name=NAMES)
    def at_once(self, name):
        in_processes(*((_publish, self.store.root, name, next(self.seeds)) for _ in range(2)))

    @rule(name=NAMES, last=st.booleans())
    def remove_version(self, name, last):
        if versions := self.store.versions(name):
            shutil.rmtree(self.store.root / name / str(versions[-1 if last else 0]))

    @rule(name=NAMES)
    def remove_ensemble(self, name):
        shutil.rmtree(self.store.root / name, ignore_errors=True)

    @rule(name=NAMES)
    def activate(self, name):
        if versions := self.store.versions(name):
            self.store.activate(name, versions[0])

    @invariant()
    def a_number_means_one_version(self):
        for name in self.store.names():
            for number in self.store.versions(name):
                version = self.store.load(name, number)
                newest = max((n for at, n in self.known if at == name), default=0)
                if (name, number) not in self.known:
                    assert number > newest
                    self.store.verify(version)
                assert self.known.setdefault((name, number), version.digest) == version.digest


TestNumbers = Numbers.TestCase
TestNumbers.settings = settings(
    max_examples=8, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_number_is_not_given_again_after_the_version_or_the_ensemble_was_removed(store):
    publish(store, "a")
    publish(store, "a")
    shutil.rmtree(store.root / "a/2")
    assert publish(store, "a").manifest.version == 3
    shutil.rmtree(store.root / "a")
    assert publish(store, "a").manifest.version == 4
    assert publish(store, "b").manifest.version == 1


def test_a_store_without_a_record_goes_on_after_the_highest_number_there(store):
    for _ in range(3):
        publish(store, "a")
    shutil.rmtree(store.root / ".numbers")
    shutil.rmtree(store.root / "a/1")
    assert publish(store, "a").manifest.version == 4


def test_a_damaged_record_stops_publication_and_says_how_to_mend_it(store):
    publish(store, "a")
    record = store.root / ".numbers/a"
    record.write_text("many")
    with pytest.raises(CorruptionError, match="highest one that you know"):
        publish(store, "a")
    record.write_text("7\n")
    assert publish(store, "a").manifest.version == 8


def test_the_last_number_is_the_last(store):
    publish(store, "a")
    (store.root / ".numbers/a").write_text(f"{10**18 - 1}\n")
    with pytest.raises(CorruptionError, match="no number left"):
        publish(store, "a")
    assert store.versions("a") == [1]


def test_folders_that_only_look_like_numbers_are_not_versions(store):
    publish(store, "a")
    for name in ("01", "١", "0", "1.0", "²"):
        shutil.copytree(store.root / "a/1", store.root / "a" / name)
    assert store.versions("a") == [1]
    assert publish(store, "a").manifest.version == 2
