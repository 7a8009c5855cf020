"""The pool of single networks, ready to run: the whole bank if it fits into memory, else a changing part of it."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models_store import files
from models_store.bank import Bank
from models_store.errors import CorruptionError, MemberError
from models_store.graphs.onnx_contract import MAX_MODEL_BYTES
from models_store.graphs.runtime import MemberSession, ProviderChoice
from models_store.inputs import kinds
from models_store.store import Version
from models_store.uncertainty import softmax

FAILED_SECONDS = 30  # pause after a network could not be opened
RENEWING = 0.05  # share of its time that the thread spends on opening new networks
# Memory of one session: a constant overhead and three copies of the weights (the original, ONNX Runtime's, and one in a
# layout for the processor). Measured for preresnet8 with 0.3 MB of weights: 0.99 MB. All sessions share one arena for
# activations: with an arena each, a batch of 32 small images left 6 MB in every session.
SESSION_BYTES, COPIES = 128 * 1024, 3
log = logging.getLogger("bentoml.modepath")


@dataclass(frozen=True, slots=True)
class Network:
    """A single network that is ready to run."""

    number: int  # index among all networks of the ensemble
    session: MemberSession
    temperature: float


@dataclass(frozen=True, slots=True)
class Source:
    """Opens the single networks of an ensemble."""

    count: int  # number of networks of the ensemble
    bytes_each: int  # estimated memory of one open network
    open: Callable[[int], Network]  # opens a network by its number


def source(version: Version, providers: ProviderChoice) -> Source:
    """Return the source of a version's single networks: the points of its bank, or its members if it has no bank."""
    manifest = version.manifest
    black = kinds.blank(manifest.input)

    def ready(number: int, session: MemberSession, temperature: float) -> Network:
        with np.errstate(all="ignore"):  # the result is checked for NaN below
            # The first run of a session takes longer. On a client's query it would reveal a network not used before.
            probs = softmax(session.logits(black) / np.float32(temperature))
        if probs.shape != (1, len(manifest.classes)) or not np.isfinite(probs).all():
            raise MemberError(
                f"Network {number} of {version.name} answers a black image with NaN, or not with a number for each class: its weights or its "
                "temperature are broken. Train and publish it again."
            )
        return Network(number, session, temperature)

    if manifest.bank is None:
        members = [version.folder / member.file for member in manifest.members]

        def member(number: int) -> Network:
            # Read and hashed each time: the file may have been changed since the version was verified.
            content = files.read(members[number], MAX_MODEL_BYTES)
            if hashlib.sha256(content).hexdigest() != manifest.files[manifest.members[number].file]:
                raise CorruptionError(f"{members[number]} is not the file that was published. Restore it from a copy.")
            session = MemberSession(content, providers, threads=1, shares_arena=True)
            return ready(number, session, manifest.members[number].temperature)

        return Source(len(members), SESSION_BYTES + COPIES * max(file.stat().st_size for file in members), member)
    bank = Bank.load(version.folder / "bank")

    def point(number: int) -> Network:
        session = MemberSession(bank.template, providers, threads=1, weights=bank.weights(number), shares_arena=True)
        return ready(number, session, float(bank.temperature[number]))

    weights = sum(weight.nbytes for weight in bank.weights(0).values())
    return Source(len(bank), SESSION_BYTES + COPIES * weights, point)


class Pool:
    """Open networks of an ensemble, by slot. Several threads may read it at once."""

    def __init__(self, source: Source, most_bytes: int, order: Sequence[int] | None = None):
        """Open as many networks as fit into memory.

        Args:
            source: opens the networks.
            most_bytes: largest size of the pool in memory; one network is held even if it is larger.
            order: network numbers in the order of the slots, for pools that must be alike. None: a random choice; the
                networks that do not fit replace others, slot after slot, as long as the pool exists.
        """
        self.source = source
        slots = min(source.count, max(1, most_bytes // source.bytes_each))
        chosen = order or secrets.SystemRandom().sample(range(source.count), source.count)
        self._networks = [source.open(number) for number in chosen[:slots]]
        if order is None and slots < source.count:
            threading.Thread(target=_renew, args=(weakref.ref(self),), name="pool", daemon=True).start()

    @property
    def bytes(self) -> int:
        """Estimated memory of all open networks, in bytes."""
        return len(self) * self.source.bytes_each

    def __len__(self) -> int:
        return len(self._networks)

    def __getitem__(self, slot: int) -> Network:
        return self._networks[slot]

    def renew(self, slot: int) -> None:
        """Replace the network in a slot by one that is in no slot, chosen uniformly at random."""
        held = {network.number for network in self._networks}
        number = secrets.choice([number for number in range(self.source.count) if number not in held])
        self._networks[slot] = self.source.open(number)


def _renew(pool: weakref.ref[Pool]) -> None:
    slot = 0
    while (held := pool()) is not None:
        began = time.perf_counter()
        try:
            held.renew(slot % len(held))
        except Exception:  # the networks already open keep answering
            log.exception("a network of the pool could not be renewed")
            pause = FAILED_SECONDS
        else:
            pause = (time.perf_counter() - began) * (1 / RENEWING - 1)
        slot += 1
        del held  # otherwise this thread would keep the pool alive for ever
        time.sleep(pause)
