"""The ensembles, queues, threads and limits of one worker process."""

from __future__ import annotations

import gc
import logging

from models_store.store import Store
from service.access.guard import Guard
from service.access.keys import Keys
from service.access.quota import Quota
from service.feedback.recorder import Limits as FeedbackLimits
from service.feedback.recorder import Recorder
from service.feedback.sampler import Sampler
from service.http.images import Limits
from service.http.intake import Intake
from service.inference.batching import Batcher, QueueLimits
from service.inference.ensemble import Ensembles
from service.inference.modes.draws import Keyed
from service.inference.offload import Offload
from service.inference.rollout import RollOuts
from service.inference.session import Rows, Session
from service.inference.trial import Trials
from service.inference.verdicts import Verdicts
from service.operations import metrics
from service.operations.drift import DriftMonitor
from service.operations.settings import Settings
from service.operations.tracing import tracer

log = logging.getLogger("bentoml.modepath")


class Worker:
    """Limits, queues, ensembles and threads of one process. No ensemble is loaded before `ensembles.follow` runs."""

    def __init__(self, chosen: Settings):
        metrics.begin()
        log.info(
            "%d worker(s), of %d thread(s) each (MODEPATH_WORKERS, MODEPATH_THREADS)", chosen.workers, chosen.threads
        )
        self.limits = Limits(rows=chosen.max_rows, bytes=chosen.held_bytes, pixels=chosen.max_pixels)
        self.intake = Intake(chosen.max_body_bytes, chosen.held_bytes, chosen.stall_seconds)
        queue = QueueLimits(
            batch_rows=chosen.batch_rows,
            batch_seconds=chosen.batch_seconds,
            rows=chosen.queue_rows,
            seconds=chosen.queue_seconds,
        )
        self.batcher = Batcher(queue, chosen.threads)
        store, shared = Store(chosen.store), Verdicts.shared()
        self.trials = Trials(
            store, queue, shared, seconds=chosen.load_seconds, most_bytes=chosen.load_bytes, workers=chosen.workers
        )
        self.ensembles = Ensembles(
            store, chosen.providers, chosen.default, threads=chosen.threads, policies=chosen.policies,
            pool_bytes=chosen.pool_bytes, keyed=Keyed(chosen.secret(), chosen.key_seconds, chosen.key_rows), warm=self._warm,
            trial=self.trials, verdicts=shared, signed_by=chosen.signed_by,
        )  # fmt: skip
        self.roll_outs = RollOuts(store, self.ensembles, metrics)
        self.offload = Offload(chosen.threads, chosen.queue_pixels)
        limits = FeedbackLimits(chosen.feedback_days, chosen.feedback_bytes)
        self.recorder = None if chosen.feedback == "off" else Recorder(chosen.feedback, limits, metrics)
        self.drift = DriftMonitor(metrics)
        self.guard = None if chosen.keys_file is None else Guard(Keys(chosen.keys_file), Quota.shared())
        self.tracer = tracer(chosen.otlp_endpoint)
        self.kept_images = Sampler(chosen.feedback_images, uncertain=chosen.feedback_images_of == "uncertain")

    def _warm(self, session: Session, row: Rows) -> None:
        self.batcher.warm(session, row)
        # Loaded networks live as long as the process. Freezing them keeps the garbage collector from scanning them
        # again and again, which delayed 1 % of answers by 20 ms.
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Stop the background threads and processes."""
        self.ensembles.close()
        self.roll_outs.close()
        self.trials.close()
        self.batcher.close()
        self.drift.close()
        if self.tracer is not None:
            self.tracer.close()
        if self.recorder is not None:
            self.recorder.close()
