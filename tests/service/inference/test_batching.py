import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from models_store.uncertainty import combine, softmax
from service.http.errors import BrokenEnsembleError, QueueFullError, QueueTimeError
from service.inference.batching import Batcher, QueueLimits
from service.inference.session import Rows, Settled

LIMITS = QueueLimits(batch_rows=8, batch_seconds=10, rows=100, seconds=10)


class Part:
    """A member whose logits identify the image and the member. It can block, count its calls, and fail."""

    def __init__(self, number, ensemble):
        self.number, self.ensemble = number, ensemble

    def logits(self, images):
        self.ensemble.gate.wait()
        value = images[:, 0, 0, 0]
        if (value == 0.5).any():
            raise RuntimeError("a bad row")
        if self.number == 0:
            self.ensemble.sizes.append(len(images))
        logits = np.stack([value, value * 2 + self.number, np.where(value == 0.25, np.nan, 0)], axis=1)
        return logits[None].astype(np.float32)


class Ensemble:
    def __init__(self, members=3):
        self.gate = threading.Event()
        self.gate.set()
        self.sizes = []
        self.parts = [Part(number, self) for number in range(members)]

    def tasks(self, rows):
        return len(self.parts)

    def run(self, task, rows):
        return self.parts[task].logits(rows.images)

    def joined(self, results):
        return np.concatenate(results)

    def settle(self, rows, logits):
        probs = softmax(logits)
        return Settled(combine(probs, np.full(len(self.parts), 1 / len(self.parts))), probs, len(logits))

    def expected(self, rows):
        with np.errstate(all="ignore"):
            return softmax(self.joined([part.logits(rows.images) for part in self.parts]))


def rows(*values):
    return Rows(np.array(values, np.float32).reshape(-1, 1, 1, 1))


@pytest.fixture
def batcher():
    made = []

    def make(limits=LIMITS, threads=2):
        made.append(Batcher(limits, threads))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def asked_alone(made, ensemble, *values):
    """The answer, and the thread that ran the members."""
    ran = []
    run = ensemble.run
    ensemble.run = lambda task, given: ran.append(threading.current_thread()) or run(task, given)
    answer = asyncio.run(made.run(ensemble, rows(*values), alone=True))
    ensemble.run = run
    return answer, ran[-1]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_short_request_that_is_alone_is_answered_at_once_and_alike(batcher, threads):
    ensemble, made = Ensemble(), batcher(threads=threads)
    before, thread = asked_alone(made, ensemble, 0.1, 0.2)
    assert thread is not threading.main_thread()  # how long it takes is not known yet
    made._row_seconds[ensemble] = 1e-5
    answer, thread = asked_alone(made, ensemble, 0.1, 0.2)
    assert thread is threading.main_thread()
    assert np.array_equal(answer.prediction.mean_probs, before.prediction.mean_probs)
    assert np.array_equal(answer.member_probs, before.member_probs)
    assert answer.queue_seconds == 0
    assert answer.members_seconds > 0
    assert made._row_seconds[ensemble] != 1e-5  # it goes on learning
    assert made.longest_seconds() < 1
    made._row_seconds[ensemble] = 1.0  # a long one
    assert asked_alone(made, ensemble, 0.1)[1] is not threading.main_thread()


def test_a_request_beside_waiting_ones_takes_its_turn(batcher):
    ensemble, made = Ensemble(), batcher(threads=1)
    made._row_seconds[ensemble] = 1e-6
    ensemble.gate.clear()

    async def both():
        first = asyncio.ensure_future(made.run(ensemble, rows(0.1)))
        await until(lambda: made._rows == 1)
        second = asyncio.ensure_future(made.run(ensemble, rows(0.2), alone=True))
        await asyncio.sleep(0.05)  # the event loop is free: it does not wait for the member
        ensemble.gate.set()
        return await asyncio.gather(first, second)

    for answer, value in zip(asyncio.run(both()), (0.1, 0.2), strict=True):
        assert answer.member_probs == pytest.approx(ensemble.expected(rows(value)))


@pytest.mark.parametrize(("value", "said"), [(0.5, "A member failed on these images: RuntimeError"), (0.25, "NaN")])
def test_what_fails_at_once_fails_as_in_a_batch(batcher, value, said):
    ensemble, made = Ensemble(), batcher()
    for known in (None, 1e-6):
        if known:
            made._row_seconds[ensemble] = known
        with pytest.raises(BrokenEnsembleError, match=said):
            asked_alone(made, ensemble, value)
    assert asked_alone(made, ensemble, 0.1)[0].prediction is not None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_everyone_gets_the_answers_to_their_own_rows(batcher, threads):
    ensemble, made = Ensemble(), batcher(threads=threads)
    asked = [rows(*np.random.default_rng(i).random(1 + i % 20) / 5) for i in range(60)]

    async def go():
        return await asyncio.gather(*(made.run(ensemble, images) for images in asked))

    made._limits = QueueLimits(8, 10, 10_000, 10)
    for images, answer in zip(asked, asyncio.run(go()), strict=True):
        expected = ensemble.expected(images)
        assert answer.member_probs == pytest.approx(expected)
        assert answer.prediction.mean_probs == pytest.approx(expected.mean(axis=0))
        assert len(answer.prediction.label) == len(answer.prediction.disagreement) == len(images)
        assert answer.queue_seconds >= 0
        assert answer.members_seconds > 0
    assert made._rows == 0


@pytest.mark.parametrize(("waiting", "expected"), [(10, [1, 5, 3, 1, 1]), (20, [1, 8, 6, 3, 2, 1])])
def test_a_batch_is_half_of_what_waits_up_to_its_bound(batcher, waiting, expected):
    ensemble, made = Ensemble(1), batcher(threads=1)

    async def go():
        ensemble.gate.clear()
        first = asyncio.ensure_future(made.run(ensemble, rows(0.1)))
        await until(lambda: not made._waiting and made._rows == 1)
        others = [asyncio.ensure_future(made.run(ensemble, rows(0.1))) for _ in range(waiting)]
        await until(lambda: len(made._waiting) == waiting)
        ensemble.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(go())
    assert ensemble.sizes == expected


def test_ensembles_are_not_mixed(batcher):
    one, other, made = Ensemble(2), Ensemble(5), batcher(threads=1)

    async def go():
        return await asyncio.gather(*(made.run((one, other)[i % 2], rows(0.1)) for i in range(20)))

    shapes = [answer.member_probs.shape for answer in asyncio.run(go())]
    assert shapes == [(2, 1, 3), (5, 1, 3)] * 10


def test_a_small_request_passes_between_the_pieces_of_a_large_one(batcher):
    ensemble, made, done = Ensemble(1), batcher(threads=1), []

    async def ask(name, count):
        await made.run(ensemble, rows(*[0.1] * count))
        done.append(name)

    async def go():
        ensemble.gate.clear()
        large = asyncio.ensure_future(ask("large", 50))
        await until(lambda: made._rows == 50 and ensemble.gate is not None and made._waiting)
        small = asyncio.ensure_future(ask("small", 1))
        await until(lambda: len(made._waiting) == 2)
        ensemble.gate.set()
        await asyncio.gather(large, small)

    asyncio.run(go())
    assert done == ["small", "large"]


def test_a_request_of_several_batches_that_is_late_is_not_overtaken_by_later_ones(batcher):
    ensemble, made, done = Ensemble(1), batcher(threads=1), []
    made._learn = lambda *_: None
    made._row_seconds[ensemble] = 0.001  # its pieces are due 24, 48 and 72 ms after it came

    async def ask(name, count):
        await made.run(ensemble, rows(*[0.1] * count))
        done.append(name)

    async def go():
        ensemble.gate.clear()
        asked = [asyncio.ensure_future(ask("first", 1))]
        await until(lambda: made._rows == 1 and not made._waiting)
        asked.append(asyncio.ensure_future(ask("large", 24)))
        await until(lambda: made._rows == 25)
        await asyncio.sleep(0.1)
        asked += [asyncio.ensure_future(ask("small", 1)) for _ in range(20)]
        await until(lambda: made._rows == 45)
        ensemble.gate.set()
        await asyncio.gather(*asked)

    asyncio.run(go())
    assert done == ["first", "large"] + ["small"] * 20
    assert made._seconds == 0


def test_a_row_that_fails_costs_the_others_nothing(batcher):
    ensemble, made = Ensemble(), batcher(threads=1)

    async def go():
        asked = [rows(0.1), rows(0.5), rows(0.2, 0.3), rows(0.25)]
        return await asyncio.gather(*(made.run(ensemble, images) for images in asked), return_exceptions=True)

    good, failed, also_good, nan = asyncio.run(go())
    assert good.prediction.mean_probs == pytest.approx(ensemble.expected(rows(0.1)).mean(axis=0))
    assert also_good.prediction.mean_probs == pytest.approx(ensemble.expected(rows(0.2, 0.3)).mean(axis=0))
    assert isinstance(failed, BrokenEnsembleError)
    assert "RuntimeError" in str(failed)
    assert isinstance(nan, BrokenEnsembleError)
    assert "NaN" in str(nan)
    assert made._rows == 0


def test_a_failing_piece_ends_its_request_only(batcher):
    ensemble, made = Ensemble(), batcher(threads=2)

    async def go():
        large = rows(*[0.1] * 30, 0.5, *[0.1] * 30, 0.5)  # two of its pieces fail
        return await asyncio.gather(made.run(ensemble, large), made.run(ensemble, rows(0.1)), return_exceptions=True)

    failed, good = asyncio.run(go())
    assert isinstance(failed, BrokenEnsembleError)
    assert good.prediction.label.shape == (1,)
    time.sleep(0.05)
    assert made._rows == 0
    assert not made._waiting


def test_beyond_its_bounds_nobody_is_let_in(batcher):
    limits = QueueLimits(batch_rows=8, batch_seconds=10, rows=3, seconds=10)
    ensemble, made = Ensemble(), batcher(limits, threads=1)

    async def go():
        ensemble.gate.clear()
        accepted = [asyncio.ensure_future(made.run(ensemble, rows(0.1))) for _ in range(3)]
        await until(lambda: made._rows == 3)
        with pytest.raises(QueueFullError) as refused:
            await made.run(ensemble, rows(0.1))
        assert refused.value.retry_after >= 1
        ensemble.gate.set()
        assert len(await asyncio.gather(*accepted)) == 3
        await made.run(ensemble, rows(*[0.1] * 50))  # nothing is queued: any size is accepted

    asyncio.run(go())


def test_whoever_could_not_be_answered_in_time_is_told_at_once(batcher):
    ensemble, made = Ensemble(), batcher(QueueLimits(8, 10, 10_000, seconds=1), threads=1)
    made._row_seconds[ensemble] = 0.3

    async def go():
        ensemble.gate.clear()
        made.refuse_if_full()
        accepted = [asyncio.ensure_future(made.run(ensemble, rows(0.1)))]
        await until(lambda: made._rows == 1 and not made._waiting)
        accepted += [asyncio.ensure_future(made.run(ensemble, rows(0.1))) for _ in range(4)]
        await until(lambda: len(made._waiting) == 4)
        with pytest.raises(QueueFullError, match=r"about 1\.2 s") as refused:
            await made.run(ensemble, rows(0.1))
        assert refused.value.retry_after == 1
        with pytest.raises(QueueFullError):
            made.refuse_if_full()
        ensemble.gate.set()
        await asyncio.gather(*accepted)
        made.refuse_if_full()

    asyncio.run(go())
    assert made._seconds == 0


def test_a_large_request_to_a_slow_ensemble_shuts_nobody_out(batcher):
    slow, quick = Ensemble(1), Ensemble(1)
    made = batcher(QueueLimits(8, 0.5, 10_000, seconds=1), threads=1)
    made._row_seconds[slow] = 0.4  # a hundred rows are 40 s of work, but each piece is one row

    async def go():
        slow.gate.clear()
        large = asyncio.ensure_future(made.run(slow, rows(*[0.1] * 100)))
        await until(lambda: made._rows == 100)
        small = [asyncio.ensure_future(made.run(quick, rows(0.1))) for _ in range(10)]
        await until(lambda: made._rows == 110)
        slow.gate.set()
        return await asyncio.gather(large, *small)

    assert len(asyncio.run(go())) == 11


def test_whoever_waited_too_long_is_told(batcher):
    ensemble, made = Ensemble(), batcher(QueueLimits(8, 10, 100, seconds=0.1), threads=1)

    async def go():
        ensemble.gate.clear()
        first = asyncio.ensure_future(made.run(ensemble, rows(0.1)))
        await until(lambda: not made._waiting and made._rows == 1)
        late = asyncio.ensure_future(made.run(ensemble, rows(0.1)))
        await asyncio.sleep(0.2)
        ensemble.gate.set()
        await first
        with pytest.raises(QueueTimeError, match=r"0\.1 s"):
            await late

    asyncio.run(go())
    assert made._rows == 0


def test_a_failure_beyond_the_members_ends_no_thread(batcher):
    ensemble, made = Ensemble(), batcher(threads=1)
    joined, ensemble.joined = ensemble.joined, None  # a programming error, which must never happen

    async def go():
        with pytest.raises(BrokenEnsembleError):
            await made.run(ensemble, rows(0.1))
        ensemble.joined = joined
        return await made.run(ensemble, rows(0.1))

    assert asyncio.run(go()).prediction.label.shape == (1,)


def test_a_client_that_gave_up_is_no_trouble(batcher):
    ensemble, made = Ensemble(), batcher(threads=1)

    async def go():
        ensemble.gate.clear()
        gone = asyncio.ensure_future(made.run(ensemble, rows(0.1)))
        await until(lambda: made._rows == 1 and not made._waiting)
        waiting = [asyncio.ensure_future(made.run(ensemble, rows(0.1))) for _ in range(5)]
        await until(lambda: len(made._waiting) == 5)
        for one in (gone, *waiting):
            one.cancel()
        await asyncio.sleep(0)
        # They are released immediately rather than at their turn.
        assert (made._rows, len(made._waiting)) == (0, 0)
        ensemble.gate.set()
        return await made.run(ensemble, rows(0.2))

    assert asyncio.run(go()).prediction.label.shape == (1,)
    assert sum(ensemble.sizes) == 2  # requests cancelled before their turn were not computed
    assert made._rows == 0


def test_the_rest_of_a_large_request_is_dropped_when_its_client_leaves(batcher):
    ensemble, made = Ensemble(), batcher(threads=1)

    async def go():
        ensemble.gate.clear()
        gone = asyncio.ensure_future(made.run(ensemble, rows(*[0.1] * 100)))
        await until(lambda: made._open is not None or not made._waiting or made._waiting[0].taken)
        gone.cancel()
        await asyncio.sleep(0)
        ensemble.gate.set()
        await made.run(ensemble, rows(0.2))

    asyncio.run(go())
    assert sum(ensemble.sizes) <= LIMITS.batch_rows + 1
    assert made._rows == 0


def test_a_batch_is_as_large_as_its_time_allows(batcher):
    ensemble, made = Ensemble(), batcher(QueueLimits(64, 0.05, 10_000, 10))
    for row_seconds, expected in ((0.0001, 64), (0.01, 5), (1.0, 1)):
        made._row_seconds[ensemble] = row_seconds
        assert made._batch_rows(ensemble) == expected


def test_warming_runs_one_image_twice_and_the_largest_batch(batcher):
    ensemble, made = Ensemble(), batcher()
    made.warm(ensemble, rows(0.1))
    assert ensemble.sizes == [1, 1, 8]
    assert made._row_seconds[ensemble] > 0


def test_an_ensemble_that_is_served_no_more_is_forgotten(batcher):
    made, ensemble = batcher(), Ensemble()
    asyncio.run(made.run(ensemble, rows(0.1)))
    gone = weakref.ref(ensemble)
    del ensemble
    for _ in range(50):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.02)
    assert gone() is None


class Staged:
    """A group of a cascade: rows whose value lies above a limit stay for the next group. It records the sizes of its batches."""

    def __init__(self, limit=1.0, further=None, seconds=0.0):
        self.limit, self.further, self.seconds, self.sizes = limit, further, seconds, []

    def tasks(self, rows):
        return 1

    def run(self, task, rows):
        time.sleep(self.seconds * len(rows))
        self.sizes.append(len(rows))
        return np.repeat(rows.images[:, 0, 0, 0], 2).reshape(1, -1, 2) * np.array([1, 2], np.float32)

    def joined(self, results):
        return results[0]

    def settle(self, rows, logits):
        if rows.carried is not None:
            logits = np.concatenate([rows.carried, logits])
        probs = softmax(logits)
        stays = rows.images[:, 0, 0, 0] > self.limit
        prediction = combine(probs[:, ~stays], np.full(len(logits), 1 / len(logits)))
        if not stays.any():
            return Settled(prediction, None, len(logits))
        return Settled(
            prediction, None, len(logits), stays, (self.further, Rows(rows.images[stays], carried=logits[:, stays]))
        )


def test_rows_that_need_more_members_continue_in_bounded_batches_and_come_back_in_order():
    last = Staged(seconds=0.001)
    first = Staged(0.3, Staged(0.6, last))
    rng = np.random.default_rng(0)
    limits = QueueLimits(batch_rows=64, batch_seconds=0.01, rows=10_000, seconds=10)

    async def ask(batcher, count):
        values = rng.random(count).astype(np.float32)
        answer = await batcher.run(first, Rows(values.reshape(-1, 1, 1, 1)))
        assert answer.used.tolist() == np.select([values > 0.6, values > 0.3], [3, 2], 1).tolist()
        expected = softmax(values[:, None] * np.array([1, 2]))
        assert answer.prediction.mean_probs == pytest.approx(expected, abs=1e-6)

    async def all_of_them():
        batcher = Batcher(limits, 2)
        for session in (first, first.further, last):
            batcher.warm(session, Rows(np.zeros((1, 1, 1, 1), np.float32)))
        last.sizes.clear()
        await asyncio.gather(*(ask(batcher, int(count)) for count in rng.integers(1, 40, 200)))
        assert batcher._rows == 0
        batcher.close()

    asyncio.run(all_of_them())
    assert sum(last.sizes) > 500
    assert (
        max(last.sizes) <= 16
    )  # about batch_seconds of the last group, although the first one takes 64 rows at a time
