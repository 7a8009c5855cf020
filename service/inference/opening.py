"""Opens one ensemble: creates its sessions, checks their answers and warms them up.

A trial and a worker run the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from models_store import examples, signing
from models_store.bank import Bank, Points
from models_store.decisions.leaving import Rule
from models_store.errors import MemberError
from models_store.graphs import threads
from models_store.graphs.runtime import EnsembleSession, ProviderChoice, default_threads
from models_store.inputs import kinds
from models_store.inputs.texts import Tokenizer
from models_store.manifest import TOKENIZER_FILE, Manifest
from models_store.store import Store, Version
from service.http.errors import BadRequestError, ForbiddenError, NoRouteError
from service.http.images import Images
from service.http.schemas import describe, padded, respond
from service.inference.decisions import HOW, Decisions
from service.inference.modes import pool as pools
from service.inference.modes.average import Average
from service.inference.modes.cascade import Stage, stages
from service.inference.modes.draws import LEVELS, Draw, Keyed, at_random, quantised
from service.inference.modes.one_each import OneEach
from service.inference.modes.pool import Pool
from service.inference.pieces import Answer
from service.inference.policy import TOGETHER, Mode, Policy
from service.inference.session import Rows, Session

CURVES = ("segment", "polychain", "bezier")  # shapes with one parameter
Warm = Callable[[Session, Rows], object]
log = logging.getLogger("bentoml.modepath")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a version is opened."""

    policy: Policy
    providers: ProviderChoice
    threads: int | None  # number of threads that run members; None: all that the process may use
    pool_bytes: int  # memory for the single networks
    signed_by: tuple[
        Path, ...
    ] = ()  # public keys, one of which must have signed the version; empty: any version is opened


@dataclass(frozen=True, slots=True)
class Ensemble:
    """An ensemble that is ready to answer in the modes that its policy opens."""

    manifest: Manifest
    identity: str  # see look.Candidate
    policy: Policy
    providers: list[str]
    sessions: dict[Mode, Session]
    pool: Pool | None  # the single networks, if a mode needs them
    draws: dict[Mode, Draw]
    decisions: Decisions
    cascades: dict[Rule, Stage]  # first stages; empty if the mode is closed, or the version has no cascade
    tokenizer: Tokenizer | None = None  # of a version that answers texts
    path: Points | None = None  # the points of its curve, if the policy shows which one answers; all are open
    version: Version | None = (
        None  # kept, because the local copy of a version from a bucket may be removed once no object refers to it
    )

    def mode(self, asked: Mode | None) -> Mode:
        """Return the mode of a request: `asked`, or the first open mode if it is None.

        Raises:
            ForbiddenError: the policy does not open the mode.
        """
        if asked is None:
            return self.policy.modes[0]
        if asked not in self.policy.modes:
            raise ForbiddenError(
                f"Mode {asked!r} of {self.manifest.name} is not open here; open: {', '.join(self.policy.modes)}."
            )
        return asked

    def session(self, mode: Mode, rule: Rule | None) -> Session:
        """Return the session that answers a request.

        Raises:
            BadRequestError: a rule without a cascade, or a cascade that the version does not support.
        """
        if mode != "cascade":
            if rule is not None:
                raise BadRequestError(f"`rule` belongs to the mode 'cascade', not to {mode!r}.")
            return self.sessions[mode]
        if not self.cascades:
            raise BadRequestError(
                f"{self.manifest.name} has no cascade: it has one member, or is not calibrated. {HOW.format(self.manifest.name)}"
            )
        if (stage := self.cascades.get(rule or "calibrated")) is None:
            raise BadRequestError(
                f"{self.manifest.name} was calibrated on too few images to guarantee anything about the calibrated cascade. "
                "Ask for the rule 'exact', or calibrate on more images."
            )
        return stage

    def check_path(self) -> None:
        """Refuse to show the networks of a curve.

        Raises:
            NoRouteError: the version has no curve, or the policy does not show its points.
        """
        if self.path is None:
            raise NoRouteError(
                f"The points of {self.manifest.name} are not shown. They are if it was trained with a curve and a bank, and the policy opens "
                '"modes": ["average", "random"] with "probabilities": "exact" and "point": true.'
            )

    def along_path(self, image: Images) -> Rows:
        """Return the input that asks every point of the curve about one image (1, C, H, W), in the order of the points."""
        assert self.pool is not None, "a curve that is shown is open"
        networks = sorted((self.pool[slot] for slot in range(len(self.pool))), key=lambda network: network.number)
        return Rows(np.broadcast_to(image, (len(networks), *image.shape[1:])), tuple(networks))

    def rows(self, mode: Mode, images: Images, caller: str = "") -> Rows:
        """Return the input for a request; in `random` and `keyed` a network is drawn for each image.

        `caller` identifies the caller if a trusted proxy names one.
        """
        if self.pool is None or mode not in self.draws:
            return Rows(images)
        asked = f"{self.manifest.name}@{self.manifest.version} {caller}".encode()
        if mode == "keyed" and images.dtype.kind == "f":
            # The network gets the same rounded pixels as the hash. Otherwise an attacker could vary an image below the
            # rounding, and query one and the same network with all variants.
            images = (quantised(images) / np.float32(LEVELS)).astype(np.float32)
        slots = self.draws[mode](images, len(self.pool), asked)
        return Rows(images, tuple(self.pool[int(slot)] for slot in slots))


def verify(store: Store, version: Version, recipe: Recipe) -> None:
    """Check that a version is what was published, and signed where the recipe requires it.

    Raises:
        StoreError: it is damaged, or is not signed by a trusted key.
    """
    store.verify(version)
    if recipe.signed_by:
        signing.check(store, version, recipe.signed_by)


def open_version(version: Version, recipe: Recipe, keyed: Keyed | None, warm: Warm) -> Ensemble:
    """Open a version and return it ready to answer.

    Args:
        version: a version whose files were verified.
        recipe: how the version is opened.
        keyed: draws networks in the mode `keyed`.
        warm: called with each session and a black image.

    Raises:
        MemberError: a member is refused, or the answers are not valid for clients.
        ProviderError: a requested execution provider is missing.
        CorruptionError: the bank cannot be read.
    """
    modes, providers = recipe.policy.modes, list[str]()
    if "keyed" in modes and version.manifest.input.kind == "features":
        raise MemberError(
            f"{version.name} takes features, for which the mode keyed is not defined: any change of a number, however small, would draw "
            "another network. Open other modes in its policy."
        )
    sessions: dict[Mode, Session] = {}
    draws: dict[Mode, Draw] = {}
    pool = None
    choose = threads.Measured.of(version.manifest.input)
    if "average" in modes:
        members = EnsembleSession(version.folder, version.manifest, recipe.providers, recipe.threads, choose)
        sessions["average"], providers = Average(members), members.providers
    cascades = stages(version, recipe.providers, recipe.threads, choose) if "cascade" in modes else {}
    if "cascade" in modes and not cascades:
        log.warning("%s has no cascade: it has one member, or is not calibrated", version.name)
    alone: list[Mode] = [mode for mode in modes if mode not in TOGETHER]
    if alone:
        source = pools.source(version, recipe.providers)
        order = keyed.order(source.count) if keyed and "keyed" in alone else None
        pool = Pool(source, recipe.pool_bytes, order)
        providers = pool[0].session.providers
        if source.count == 1:
            log.warning("%s has only one network, which answers every query in every mode", version.name)
        each = OneEach(recipe.threads or default_threads())
        for mode in alone:
            sessions[mode], draws[mode] = each, _draw(mode, keyed)
        log.info("%s: %d of %d networks ready, %d MiB", version.name, len(pool), source.count, pool.bytes >> 20)
    ensemble = Ensemble(
        version.manifest,
        f"{version.name} {version.digest}",
        recipe.policy,
        providers,
        sessions,
        pool,
        draws,
        Decisions.of(version, recipe.policy, draws_all=pool is None or len(pool) == pool.source.count),
        cascades,
        tokenizer=_tokenizer(version),
        path=_path(version, recipe.policy, pool),
        version=version,
    )
    _check_listing(ensemble)
    _self_test(ensemble, version)
    black, noise = kinds.blank(version.manifest.input), kinds.noise(version.manifest.input, 2)
    for mode in modes:
        ensemble.decisions.check_policy(mode)
    for stage in [stage for first in cascades.values() for stage in first.chain()]:
        warm(stage, Rows(black))
    for mode in sessions:
        for images in (black, noise):
            _check_answer(ensemble, mode, images)
        warm(sessions[mode], ensemble.rows(mode, black))
    return ensemble


def _tokenizer(version: Version) -> Tokenizer | None:
    if not version.manifest.input.tokenizer:
        return None
    return Tokenizer((version.folder / TOKENIZER_FILE).read_bytes())


def _path(version: Version, policy: Policy, pool: Pool | None) -> Points | None:
    """The points of a curve whose answers clients may see."""
    geometry = version.manifest.geometry
    shown = not policy.defended and policy.point and "random" in policy.modes and policy.digits("random") == "exact"
    if not shown or geometry is None or version.manifest.bank is None or pool is None or len(pool) < pool.source.count:
        return None
    if geometry.shape not in CURVES or len(geometry.components) > 1:
        return None
    return Points.of(Bank.load(version.folder / "bank"))


def _draw(mode: Mode, keyed: Keyed | None) -> Draw:
    if mode == "random":
        return at_random
    assert keyed is not None, "`keyed` is opened with a key"
    return keyed


def _check_listing(ensemble: Ensemble) -> None:
    manifest = ensemble.manifest
    try:
        shown = describe(manifest, ensemble.providers, ensemble.policy, None, is_default=False)
        orjson.dumps(shown.model_dump(mode="json"))
    except Exception as error:  # the exceptions of pydantic and orjson share no base class
        raise MemberError(
            f"{manifest.name}@{manifest.version} cannot be shown to clients as JSON ({error}): a class name is likely not valid Unicode. "
            "Publish it again with other names."
        ) from None


def _self_test(ensemble: Ensemble, version: Version) -> None:
    """Raise MemberError if a network does not answer as it did when it was published."""
    if (recorded := examples.load(version.folder, version.manifest)) is None:
        return
    with np.errstate(all="ignore"):  # differences and NaN are found by the check
        if "average" in ensemble.sessions:
            session, rows = ensemble.sessions["average"], Rows(recorded.inputs)
            outputs = session.joined([session.run(task, rows) for task in range(session.tasks(len(rows)))])
            for number, logits in enumerate(outputs.logits):
                recorded.check(version.name, number, logits)
        if (pool := ensemble.pool) is not None:
            of_bank = version.manifest.bank is not None
            for network in (pool[slot] for slot in range(len(pool))):
                if not of_bank or network.number in recorded.points:
                    logits = network.session.logits(recorded.inputs)
                    recorded.check(version.name, network.number, logits, of_bank=of_bank)


def _check_answer(ensemble: Ensemble, mode: Mode, images: Images) -> None:
    """Raise MemberError if an answer is not valid for clients."""
    manifest, policy, session = ensemble.manifest, ensemble.policy, ensemble.sessions[mode]
    rows = ensemble.rows(mode, images)
    with np.errstate(all="ignore"):  # the result is checked for NaN below
        try:
            outputs = session.joined([session.run(task, rows) for task in range(session.tasks(len(rows)))])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise MemberError(
                f"A member of {manifest.name}@{manifest.version} fails on a plain image: {error}"
            ) from None
        expected = (len(manifest.members) if mode == "average" else 1, len(rows), len(manifest.classes))
        if outputs.logits.shape != expected:
            raise MemberError(
                f"{manifest.name}@{manifest.version} answers {len(rows)} images with logits of shape {outputs.logits.shape} instead of {expected} "
                "(members, batch, classes). Export its members with a free batch axis, and publish them again."
            )
        settled = session.settle(rows, outputs)
        prediction = settled.prediction
    if not np.isfinite(prediction.mean_probs).all():
        raise MemberError(
            f"{manifest.name}@{manifest.version} answers a plain image with NaN: weights of a member, or a temperature, are broken. "
            "Train and publish it again."
        )
    points = [network.number for network in rows.networks]
    shows = mode == "average" and policy.shows_members
    answer = Answer(settled.member_probs, prediction, 0.0, 0.0)
    reply = orjson.dumps(respond(manifest, "0" * 16, mode, answer, policy, members=shows, points=points))
    if mode != "average":
        padded(reply, manifest, policy, mode, len(rows))
