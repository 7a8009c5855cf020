import gc
import time
import weakref

import numpy as np
import pytest

from models_store.uncertainty import softmax
from service.inference.modes import pool as pools
from service.inference.modes.one_each import OneEach
from service.inference.modes.pool import Pool, source
from service.inference.session import Rows
from tests import onnx_members
from tests.onnx_members import CLASSES, SHAPE, linear, linear_logits, point_logits, publish

IMAGES = np.random.default_rng(0).random((6, *SHAPE)).astype(np.float32)


def answers(networks, threads=4):
    """Probabilities, (batch, classes), with each row computed by its own network."""
    each, rows = OneEach(threads), Rows(IMAGES, tuple(networks))
    assert each.tasks(len(rows)) == min(threads, len(rows))
    outputs = each.joined([each.run(task, rows) for task in range(each.tasks(len(rows)))])
    assert outputs.logits.shape == (1, len(rows), CLASSES)
    return each.settle(rows, outputs).prediction.mean_probs


def test_each_row_is_answered_by_the_point_it_drew_at_that_points_temperature(store):
    bank = onnx_members.bank(points=7)
    pool = Pool(source(publish(store, "a", bank=bank), "cpu"), 2**30)
    assert sorted(network.number for network in pool) == list(range(7))
    drawn = [pool[place] for place in (3, 0, 3, 6, 1, 5)]
    expected = [
        softmax(point_logits(bank, network.number, IMAGES[i : i + 1]), bank.temperature[network.number])[0]
        for i, network in enumerate(drawn)
    ]
    for threads in (1, 2, 4, 9):
        assert answers(drawn, threads) == pytest.approx(np.array(expected), abs=1e-5)


def test_without_a_bank_the_members_are_the_networks(store):
    pool = Pool(source(publish(store, "a", seeds=(0, 1, 2)), "cpu"), 2**30)
    drawn = [pool[i % 3] for i in range(6)]
    expected = [softmax(linear_logits(linear(network.number), IMAGES[i : i + 1]))[0] for i, network in enumerate(drawn)]
    assert answers(drawn) == pytest.approx(np.array(expected), abs=1e-5)


def test_no_more_are_held_than_fit_but_one(store):
    found = source(publish(store, "a", bank=onnx_members.bank(points=7)), "cpu")
    assert len(Pool(found, 3 * found.bytes_each)) == 3
    assert Pool(found, 3 * found.bytes_each).bytes <= 3 * found.bytes_each
    assert len(Pool(found, 1)) == 1


def test_those_that_do_not_fit_take_turns(store, monkeypatch):
    monkeypatch.setattr(pools, "RENEWING", 0.9)
    found = source(publish(store, "a", bank=onnx_members.bank(points=7)), "cpu")
    pool = Pool(found, 3 * found.bytes_each)
    seen, deadline = set(), time.monotonic() + 20
    while len(seen) < 7 and time.monotonic() < deadline:
        held = [network.number for network in pool]
        assert len(held) == 3
        seen |= set(held)
    assert seen == set(range(7))
    gone = weakref.ref(pool)
    del pool
    deadline = time.monotonic() + 20
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
    assert gone() is None


def test_a_failed_renewal_is_tried_again_soon(store, monkeypatch):
    monkeypatch.setattr(pools, "RENEWING", 1e-6)  # share of the time; failed renewals must not count towards it
    monkeypatch.setattr(pools, "FAILED_SECONDS", 0.01)
    tried = []

    def renew(self, place):
        tried.append(place)
        raise MemoryError

    monkeypatch.setattr(Pool, "renew", renew)
    found = source(publish(store, "a", bank=onnx_members.bank(points=4)), "cpu")
    pool = Pool(found, 2 * found.bytes_each)
    deadline = time.monotonic() + 20
    while len(tried) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tried[:4] == [0, 1, 0, 1]
    assert len(pool) == 2


def test_a_renewed_place_holds_a_network_that_was_in_none(store):
    found = source(publish(store, "a", bank=onnx_members.bank(points=4)), "cpu")
    pool = Pool(found, 3 * found.bytes_each, order=[2, 0, 1, 3])
    assert [network.number for network in pool] == [2, 0, 1]
    pool.renew(1)
    assert [network.number for network in pool] == [2, 3, 1]


def test_pools_that_must_be_alike_stay_as_they_are(store):
    found = source(publish(store, "a", bank=onnx_members.bank(points=7)), "cpu")
    pool = Pool(found, 3 * found.bytes_each, order=[4, 1, 6, 0, 2, 3, 5])
    time.sleep(0.2)
    assert [network.number for network in pool] == [4, 1, 6]
