"""Networks that one query each may get, ready to run: the whole bank where it fits into memory, else a part that is renewed."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models_store.bank import Bank
from models_store.errors import MemberError
from models_store.graphs.runtime import MemberSession, ProviderChoice
from models_store.store import Version
from models_store.uncertainty import softmax

FAILED_SECONDS = 30
RENEWING = 0.05  # share of its time that a thread spends on new networks
# What a session takes: its weights as they are, once more in ONNX Runtime, once laid out for the processor, and something beside them; with preresnet8's 0.3 MB
# of weights 0.99 MB were measured. Activations are in an arena that all of them share: with one each, a batch of 32 small images left 6 MB in every session.
SESSION_BYTES, COPIES = 128 * 1024, 3
log = logging.getLogger("bentoml.modepath")


@dataclass(frozen=True, slots=True)
class Network:
    """One of them."""

    number: int  # among all that the ensemble has
    session: MemberSession
    temperature: float


@dataclass(frozen=True, slots=True)
class Source:
    """Where an ensemble's single networks come from."""

    count: int
    bytes_each: int  # that one takes in memory, ready to run
    open: Callable[[int], Network]


def source(version: Version, providers: ProviderChoice) -> Source:
    """The points of its bank, or its members where it has none."""
    manifest = version.manifest
    black = np.zeros((1, *manifest.input.shape), np.float32)

    def ready(number: int, session: MemberSession, temperature: float) -> Network:
        with np.errstate(all="ignore"):  # what comes out is looked at
            # The first answer takes longer: it would tell a network that was not asked before.
            probs = softmax(session.logits(black) / np.float32(temperature))
        if probs.shape != (1, len(manifest.classes)) or not np.isfinite(probs).all():
            raise MemberError(
                f"Network {number} of {version.name} answers a black image with NaN, or not with a number for each class: its weights or its "
                "temperature are broken. Train and publish it again."
            )
        return Network(number, session, temperature)

    if manifest.bank is None:
        files = [version.folder / member.file for member in manifest.members]

        def member(number: int) -> Network:
            session = MemberSession(files[number], providers, threads=1, shares_arena=True)
            return ready(number, session, manifest.members[number].temperature)

        return Source(len(files), SESSION_BYTES + COPIES * max(file.stat().st_size for file in files), member)
    bank = Bank.load(version.folder / "bank")

    def point(number: int) -> Network:
        session = MemberSession(bank.template, providers, threads=1, weights=bank.weights(number), shares_arena=True)
        return ready(number, session, float(bank.temperature[number]))

    weights = sum(weight.nbytes for weight in bank.weights(0).values())
    return Source(len(bank), SESSION_BYTES + COPIES * weights, point)


class Pool:
    """Some networks of an ensemble, by slot. Several threads may ask at once."""

    def __init__(self, source: Source, most_bytes: int, order: Sequence[int] | None = None):
        """Open as many as fit.

        Args:
            source: opens them.
            most_bytes: of memory; one network is held even where it takes more.
            order: the networks in the order of their slots, for pools that must be alike. None: those that do not fit take turns
                with those that do, one slot after the other, for as long as the pool lives.
        """
        self.source = source
        slots = min(source.count, max(1, most_bytes // source.bytes_each))
        chosen = order or secrets.SystemRandom().sample(range(source.count), source.count)
        self._networks = [source.open(number) for number in chosen[:slots]]
        if order is None and slots < source.count:
            threading.Thread(target=_renew, args=(weakref.ref(self),), name="pool", daemon=True).start()

    @property
    def bytes(self) -> int:
        """Of memory, about."""
        return len(self) * self.source.bytes_each

    def __len__(self) -> int:
        return len(self._networks)

    def __getitem__(self, slot: int) -> Network:
        return self._networks[slot]

    def renew(self, slot: int) -> None:
        """Put a network there that is in no slot, each as likely."""
        held = {network.number for network in self._networks}
        number = secrets.choice([number for number in range(self.source.count) if number not in held])
        self._networks[slot] = self.source.open(number)


def _renew(pool: weakref.ref[Pool]) -> None:
    slot = 0
    while (held := pool()) is not None:
        began = time.perf_counter()
        try:
            held.renew(slot % len(held))
        except Exception:  # the networks that are there go on answering
            log.exception("a network of the pool could not be renewed")
            pause = FAILED_SECONDS
        else:
            pause = (time.perf_counter() - began) * (1 / RENEWING - 1)
        slot += 1
        del held  # or it would never be let go
        time.sleep(pause)
