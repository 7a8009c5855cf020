"""The way of a request from its parsed body to its answer, the same for every protocol.

A protocol (service/app.py, service/oip) reads a request into `Asked`, and writes what comes out, `Answered`, in its own form.
Choosing the version, decoding, limits, quotas, the queue, metrics and feedback lie between, here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from models_store.manifest import InputSpec, Manifest
from service.access.keys import Key
from service.feedback.answers import of_answer
from service.feedback.database import new_id
from service.http import columns
from service.http.bodies import Asked
from service.http.columns import Columns
from service.http.errors import (
    BadRequestError,
    DeadlineError,
    ForbiddenError,
    NotReadyError,
    ServiceError,
    TooLargeError,
    UnknownEnsembleError,
)
from service.http.images import PIXELS_OF_A_CHARACTER, Encoded, Images, from_texts, work_of
from service.http.intake import Body
from service.http.schemas import Options
from service.inference.decisions import Decided
from service.inference.offload import SMALL_PIXELS
from service.inference.opening import Ensemble
from service.inference.pieces import Answer
from service.inference.policy import TOGETHER, Mode, Policy
from service.inference.session import Rows
from service.operations import metrics
from service.operations.settings import Settings
from service.worker import Worker

# Up to these sizes work is done on the event loop, because handing it to a thread would take longer.
INLINE_BYTES = 64 * 1024  # to parse and decode
INLINE_CHARACTERS = 4096  # characters to turn into token ids
INLINE_ROWS = 32  # to write and count
INLINE_NUMBERS = 4096
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, as far as the service knows."""

    caller: str = ""  # name of the API key, or what a trusted proxy says; "" without both
    key: Key | None = None
    given_id: str | None = None  # an id that the client or a proxy gave, so that their logs and ours can be joined
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    log_fields: dict[str, Any] | None = None  # of the access log; what is known of the answer is added
    is_alone: Callable[[], bool] = lambda: False  # whether no other request is being answered by this process


def asker(
    key: Key | None,
    header: str | None,
    named: Sequence[str],
    headers: Mapping[str, str],
    log_fields: dict[str, Any] | None = None,
    is_alone: Callable[[], bool] = lambda: False,
) -> Asker:
    """Return who asks: the owner of an API key, or whom a trusted proxy names.

    Args:
        key: the API key, if the service has keys.
        header: the header in which a proxy names callers, if there is one.
        named: what that header says in this request. A request without exactly one is refused: a client that could add
            one would get a draw for each name.
        headers: of the request.
        log_fields: of the access log.
        is_alone: whether this process answers no other request at the moment.

    Raises:
        BadRequestError: the caller is not named once.
    """
    caller = "" if key is None else key.name
    if key is None and header is not None:
        if len(named) != 1:
            raise BadRequestError(
                f"The request has {len(named)} {header} headers instead of one. The operator's proxy must set it, and overwrite what clients send."
            )
        caller = named[0]
    given_id = headers.get("x-request-id", "")
    plain = given_id if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given_id) else None
    return Asker(caller, key, plain, headers, log_fields, is_alone)


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer before it is written."""

    manifest: Manifest
    policy: Policy
    mode: Mode
    options: Options
    request_id: str
    rows: Rows
    answer: Answer
    decided: Decided

    def columns(self) -> Columns:
        """The fields that the policy shows; see service/http/columns.py."""
        return columns.shown(
            self.manifest.classes, self.mode, self.answer, self.policy, members=self.options.members,
            points=[network.number for network in self.rows.networks], decided=self.decided,
        )  # fmt: skip


Read = Callable[[Sequence[InputSpec]], Asked]
Write = Callable[[Answered], bytes]


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncGenerator[None]:
    """Raise DeadlineError if the block takes longer than this."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError(
            f"Not answered within {seconds:g} seconds (MODEPATH_TIMEOUT). Send the body faster, or fewer images at a time."
        ) from None


class Predictor:
    """Answers the requests of one worker."""

    def __init__(self, chosen: Settings, worker: Worker):
        self._settings, self._worker = chosen, worker

    async def answer(self, body: Body, read: Read, write: Write, asker: Asker) -> bytes:
        """Answer one request.

        Args:
            body: as received; counted as held until the request ends.
            read: parses it, given the inputs of the ensembles that are served if the body is large, else none.
            write: writes the answer. Both may run in a thread.
            asker: who asks.

        Raises:
            ServiceError: the request cannot be answered; its class says why.
        """
        worker = self._worker
        worker.batcher.refuse_if_full()
        began = time.perf_counter()
        large = len(body.data) > INLINE_BYTES
        if large and (why := worker.ensembles.why_not_ready()) is not None:
            raise NotReadyError(why)  # without an ensemble there are no shapes to check the body against
        parse = partial(read, [ensemble.manifest.input for ensemble in worker.ensembles.all()] if large else ())
        asked = await worker.offload.run(body, parse) if large else parse()
        options = asked.options
        active = worker.ensembles.get(options.ensemble)
        ensemble, mode = self._choice(active, asked, asker)
        images = await self.decoded(body, asked, ensemble)
        self._bound_answer(ensemble, len(images), options.members)
        if worker.guard is not None:
            worker.guard.charge(asker.key, len(images))
        decode_seconds = time.perf_counter() - began
        ask = partial(self._asked, body, mode, options, images, asker.caller)
        try:
            if ensemble is active:
                rows, answer = await ask(active, alone=mode != "cascade" and asker.is_alone())
            else:
                ensemble, (rows, answer) = await worker.roll_outs.answer(active, ensemble, ask)
        except ServiceError:  # what was not answered does not count
            if worker.guard is not None:
                worker.guard.charge(asker.key, -len(images))
            raise
        request_id = new_id(time.time())
        manifest = ensemble.manifest
        if asker.log_fields is not None:
            asker.log_fields.update(
                {"request_id": request_id, "ensemble": manifest.name, "version": manifest.version, "rows": len(images)}
            )
            if asker.given_id:
                asker.log_fields["given_request_id"] = asker.given_id
        write_it = partial(self._written, ensemble, mode, options, request_id, rows, answer, decode_seconds, write)
        written = time.perf_counter()
        numbers = answer.prediction.mean_probs.size if answer.member_probs is None else answer.member_probs.size
        large = len(images) > INLINE_ROWS or numbers > INLINE_NUMBERS
        reply = await worker.offload.run(body, write_it) if large else write_it()
        if worker.tracer is not None:
            attributes = {
                "modepath.ensemble": manifest.name, "modepath.version": manifest.version, "modepath.mode": mode,
                "modepath.rows": len(images), "modepath.request_id": request_id,
            }  # fmt: skip
            worker.tracer.predicted(asker.headers, attributes, decode_seconds, answer, time.perf_counter() - written)
        worker.roll_outs.compare(active, mode, images)
        return reply

    async def decoded(self, body: Body, asked: Asked, ensemble: Ensemble) -> Images:
        """Decode the input: small arrays on the event loop, the rest in threads, with a lane for large encoded images."""
        worker = self._worker
        limits, spec = replace(worker.limits, hold=partial(worker.intake.decode, body)), ensemble.manifest.input

        is_field = ensemble.tokenizer is None and any(one.name == "texts" for one in spec.fields or ())
        if (texts := asked.texts) is not None and not is_field:
            read = partial(from_texts, texts, spec, ensemble.tokenizer, limits)
            work = work_of(texts) if ensemble.tokenizer is not None else 0
            if work > limits.pixels or work <= INLINE_CHARACTERS * PIXELS_OF_A_CHARACTER:  # refused, or done at once
                return read()
            return await worker.offload.decode(body, work, read)

        def opened() -> Images | Encoded:
            found = asked.open(spec, limits)
            return found.decode() if isinstance(found, Encoded) and found.pixels <= SMALL_PIXELS else found

        long = asked.encoded or len(body.data) > INLINE_BYTES or asked.named * len(spec.fields or ()) > INLINE_NUMBERS
        found = await worker.offload.run(body, opened) if long else opened()
        return await worker.offload.decode(body, found.pixels, found.decode) if isinstance(found, Encoded) else found

    async def _asked(
        self, body: Body, mode: Mode, options: Options, images: Images, caller: str, ensemble: Ensemble, *, alone: bool = False
    ) -> tuple[Rows, Answer]:  # fmt: skip
        """Run one version on the images of a request."""
        worker, draw = self._worker, partial(ensemble.rows, mode, images, caller)
        large = mode not in TOGETHER and images.nbytes > INLINE_BYTES
        rows = await worker.offload.run(body, draw) if large else draw()
        return rows, await worker.batcher.run(ensemble.session(mode, options.rule), rows, alone=alone)

    def _choice(self, active: Ensemble, asked: Asked, asker: Asker) -> tuple[Ensemble, Mode]:
        """Return the version that answers a request, and the mode: the active one, too, where its canary cannot do what is asked."""
        options, version = asked.options, asked.version
        keyed = (options.mode or active.policy.modes[0]) == "keyed"
        if version is not None:
            return _exactly(active, version, keyed=keyed), _check(active, asked)
        # In `keyed` a client must not choose the version, or it would get a draw from each.
        alone = keyed and not asker.caller
        chosen = active if alone else self._worker.roll_outs.choose(active, asker.caller or asker.given_id or "")
        if chosen is not active:
            try:
                return chosen, _check(chosen, asked)
            except BadRequestError:  # it has no calibration or cascade, for example
                if keyed:
                    raise
        return active, _check(active, asked)

    def _bound_answer(self, ensemble: Ensemble, rows: int, members: bool) -> None:
        manifest = ensemble.manifest
        numbers = rows * len(manifest.classes) * (len(manifest.members) if members else 1)
        if numbers > self._settings.max_numbers:
            raise TooLargeError(
                f"The answer would hold {numbers} numbers; at most {self._settings.max_numbers} are allowed. Send fewer images, or do not ask for members."
            )

    def _written(
        self,
        ensemble: Ensemble,
        mode: Mode,
        options: Options,
        request_id: str,
        rows: Rows,
        answer: Answer,
        decode_seconds: float,
        write: Write,
    ) -> bytes:
        began = time.perf_counter()
        manifest, policy = ensemble.manifest, ensemble.policy
        decided = ensemble.decisions.decide(mode, options, rows.images, answer.prediction)
        reply = write(Answered(manifest, policy, mode, options, request_id, rows, answer, decided))
        # Counted before it is sent, so that a client that has its answer finds it in the metrics.
        seconds = time.perf_counter() - began
        each = not policy.hides(mode) or self._settings.metrics_port is not None
        metrics.answered(manifest, mode, answer, decode_seconds, seconds, each=each, decided=decided)
        labels = manifest.name, str(manifest.version), mode
        calibration = ensemble.decisions.calibration(mode)
        if calibration is not None and each:
            self._worker.drift.add(labels, calibration, rows.images, answer.prediction)
        if (recorder := self._worker.recorder) is not None:
            if not policy.hides(mode):
                metrics.expect_feedback(labels, options.coverage, decided=decided.decisions is not None)
            recorder.keep(
                of_answer(
                    request_id, time.time(), manifest.name, manifest.version, mode, answer.prediction, shown=not policy.hides(mode),
                    coverage=options.coverage, sets=decided.sets, decisions=decided.decisions,
                    images=self._worker.kept_images(calibration, rows.images, answer.prediction),
                )
            )  # fmt: skip
        return reply


def _exactly(active: Ensemble, version: int, *, keyed: bool) -> Ensemble:
    """Return the active version if it is the one that was asked for."""
    name = active.manifest.name
    if keyed:
        raise BadRequestError("In mode 'keyed' the service chooses the version; leave it out of the address.")
    if version != active.manifest.version:
        raise UnknownEnsembleError(
            f"{name}@{version} is not served; {name}@{active.manifest.version} is. Leave the version out to ask whichever is active."
        )
    return active


def _check(ensemble: Ensemble, asked: Asked) -> Mode:
    """Check that an ensemble can do what is asked, and return the mode."""
    options = asked.options
    mode = ensemble.mode(options.mode)
    _refuse_members(ensemble, mode, options)
    ensemble.decisions.check(mode, options)
    ensemble.session(mode, options.rule)
    if asked.check is not None:
        asked.check(ensemble, mode)
    return mode


def _refuse_members(ensemble: Ensemble, mode: Mode, options: Options) -> None:
    if not options.members:
        return
    if mode == "cascade":
        raise BadRequestError(
            "Mode 'cascade' does not run all members for each image; ask for `members` in mode 'average'."
        )
    if mode != "average":
        raise BadRequestError(f"Mode {mode!r} answers with one network for each image; it cannot return `members`.")
    if not ensemble.policy.shows_members:
        raise ForbiddenError(
            f"The operator does not show the probabilities of each member of {ensemble.manifest.name}."
        )
