import multiprocessing
import os

import numpy as np
import pytest
from scipy import stats

from service.inference.modes.draws import Keyed, at_random

IMAGES = np.random.default_rng(0).random((400, 1, 4, 4)).astype(np.float32)
SECRET = b"a key of some length"


def keyed(now=lambda: 0.0, **options):
    return Keyed(SECRET, **{"seconds": 60, "rows": None, **options}, now=now)


@pytest.mark.parametrize("draw", [at_random, keyed()])
def test_every_network_is_as_likely(draw):
    images = np.random.default_rng(1).random((20_000, 1, 2, 2)).astype(np.float32)
    counts = np.bincount(draw(images, 16, b"a@1"), minlength=16)
    assert len(counts) == 16
    assert stats.chisquare(counts).pvalue > 1e-4


def test_random_draws_do_not_follow_one_another():
    drawn = at_random(np.zeros((20_000, 1)), 16, b"a@1")
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (drawn[:-1:2], drawn[1::2]), 1)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def _drawn(queue):
    queue.put(at_random(np.zeros((64, 1)), 2**31, b"").tolist())


def test_forked_processes_draw_apart():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_drawn, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    one, two = queue.get(timeout=30), queue.get(timeout=30)
    for worker in workers:
        worker.join()
    assert not set(one) & set(two)
    assert not set(one) & set(at_random(np.zeros((64, 1)), 2**31, b"").tolist())


def test_a_seed_changes_nothing():
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(at_random(np.zeros((64, 1)), 2**31, b"").tolist())
    assert drawn[0] != drawn[1]


def test_the_same_question_gets_the_same_network_in_any_place_and_process():
    first = keyed()(IMAGES, 256, b"a@1")
    order = np.random.default_rng(2).permutation(len(IMAGES))
    assert (keyed()(IMAGES[order], 256, b"a@1") == first[order]).all()
    assert [keyed()(IMAGES[i : i + 1], 256, b"a@1")[0] for i in range(5)] == first[:5].tolist()


def test_what_an_image_file_cannot_tell_apart_is_one_question():
    exact = np.rint(IMAGES * 255) / np.float32(255)
    noise = np.random.default_rng(3).uniform(-0.4, 0.4, IMAGES.shape) / 255
    near = np.clip(exact + noise, 0, 1).astype(np.float32)
    assert (keyed()(exact, 256, b"a@1") == keyed()(near, 256, b"a@1")).all()
    further = np.clip(exact + 1 / np.float32(255), 0, 1)
    assert (keyed()(exact, 256, b"a@1") != keyed()(further, 256, b"a@1")).mean() > 0.9


@pytest.mark.parametrize(
    "other", [Keyed(b"another key of some length", 60, None, lambda: 0.0), keyed(now=lambda: 61.0)], ids=["key", "time"]
)
def test_another_key_or_time_is_another_network(other):
    same = (keyed()(IMAGES, 256, b"a@1") == other(IMAGES, 256, b"a@1")).mean()
    assert same < 0.05


def test_another_ensemble_or_version_is_another_network():
    one = keyed()
    assert (one(IMAGES, 256, b"a@1") == one(IMAGES, 256, b"a@2")).mean() < 0.05


def test_the_key_turns_after_so_many_rows():
    turning = keyed(rows=800)
    first, second, third = (turning(IMAGES, 256, b"a@1") for _ in range(3))
    assert (first == second).all()
    assert (second != third).mean() > 0.9


def test_a_restart_does_not_repeat_the_keys_that_were_counted():
    assert (keyed(rows=800)(IMAGES, 256, b"a@1") == keyed(rows=800)(IMAGES, 256, b"a@1")).mean() < 0.05


def test_pools_of_one_key_hold_the_same_networks():
    assert sorted(keyed().order(50)) == list(range(50))
    assert keyed().order(50) == keyed(now=lambda: 1e6).order(50)
    assert keyed().order(50) != Keyed(os.urandom(32), 60, None).order(50)


def test_a_clock_that_is_set_back_brings_no_earlier_key_back():
    clock = [61.0]
    turning = keyed(now=lambda: clock[0])
    second = turning(IMAGES, 256, b"a@1")
    clock[0] = 0.0
    assert (turning(IMAGES, 256, b"a@1") == second).all()
    assert (turning(IMAGES, 256, b"a@1") != keyed(now=lambda: 0.0)(IMAGES, 256, b"a@1")).any()
