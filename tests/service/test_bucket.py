"""Replicas of a service on one bucket: activations, keyed answers, and a bucket that cannot be reached."""

import threading
import time

import numpy as np
import pytest

from models_store.store import Store
from service.client import Client
from tests.buckets import serving
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service.test_workers import expected

IMAGES = np.random.default_rng(0).random((4, *SHAPE), np.float32)
SEEDS = {1: (0, 1, 2), 2: (5, 6, 7)}


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture
def remote(buckets, monkeypatch, tmp_path):
    for name, value in buckets.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://{buckets.make()}/models")


class Asker(threading.Thread):
    """Asks one replica until stopped; each answer must be that of the version that it names."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.stopped, self.wrong, self.seen = url, threading.Event(), [], []
        self.right = {version: expected(seeds, IMAGES).mean_probs for version, seeds in SEEDS.items()}
        self.start()

    def run(self):
        with Client(self.url, attempts=1) as client:
            while not self.stopped.is_set():
                try:
                    answer = client.predict(IMAGES)
                except Exception as error:
                    self.wrong.append(error)
                    continue
                self.seen.append((time.monotonic(), answer.version))
                if np.abs(answer.probs - self.right[answer.version]).max() > 1e-5:
                    self.wrong.append(answer)

    def stop(self):
        self.stopped.set()
        self.join(30)


def test_replicas_take_an_activation_under_load_and_a_bucket_that_is_away_costs_no_answer(
    remote, serve, buckets, tmp_path
):
    for seeds in SEEDS.values():
        publish(remote, "e", seeds)
    remote.activate("e", 1)
    # Each replica has a cache of its own, as on machines of their own.
    replicas = [serve(remote, MODEPATH_WORKERS="1", MODEPATH_CACHE=str(tmp_path / f"cache-{i}")) for i in range(3)]
    for one in replicas:
        one.until(200, seconds=120)
    askers = [Asker(one.url) for one in replicas]
    time.sleep(1)
    remote.activate("e", 2)
    deadline = time.monotonic() + 60
    while any(asker.seen[-1][1] != 2 for asker in askers) and time.monotonic() < deadline:
        time.sleep(0.1)
    for asker in askers:
        versions = [version for _, version in asker.seen]
        assert versions == sorted(versions)  # once the new one answers, the old one never does
        assert versions[0] == 1
        assert versions[-1] == 2
    answered = [len(asker.seen) for asker in askers]
    with buckets.unreachable():
        time.sleep(6)
        assert all(len(asker.seen) > before for asker, before in zip(askers, answered, strict=True))
    remote.activate("e", 1)
    deadline = time.monotonic() + 120
    while any(asker.seen[-1][1] != 1 for asker in askers) and time.monotonic() < deadline:
        time.sleep(0.1)
    for asker in askers:
        asker.stop()
        assert asker.wrong == []
        assert asker.seen[-1][1] == 1  # each replica found the bucket again


def test_a_keyed_question_has_one_answer_on_all_replicas(remote, serve):
    publish(remote, "e", (0, 1, 2, 3, 4))
    policies = '{"*": {"modes": ["keyed"], "probabilities": "exact"}}'
    replicas = [serve(remote, MODEPATH_POLICIES=policies, MODEPATH_KEY="one secret of all replicas") for _ in range(2)]
    answers = []
    for one in replicas:
        one.until(200, seconds=120)
        with Client(one.url) as client:
            answers.append([client.predict(IMAGES[i : i + 1]).probs for i in range(4)])
    assert np.array_equal(*answers)
    alone = [linear_logits(linear(seed), IMAGES) for seed in range(5)]
    assert len({float(one.max()) for one in alone}) == 5  # the networks differ
