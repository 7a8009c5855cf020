"""The self-test of a version: examples, and what its networks answered to them when it was published.

A service that serves the version must compute the same. It may run on another processor, with another release of ONNX
Runtime, or on a GPU, whose libraries may be broken. The examples are generated: a store must not hold images of people
only because a network was trained on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from models_store import files
from models_store.bank import Bank
from models_store.errors import CorruptionError, MemberError
from models_store.graphs.runtime import MemberSession
from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import EXAMPLES_FILE, Draft, Manifest
from models_store.uncertainty import softmax

ROWS = 4  # of noise; a plain row comes on top
POINTS = 8  # networks of a bank, spread evenly over it
# Largest difference of a probability. Members in float32 differ by about 1e-6 between processors. A kernel that is wrong
# differs by far more.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Examples:
    """What a version must answer."""

    inputs: Inputs  # (examples, *shape)
    members: NDArray[np.float32]  # logits (members, examples, classes)
    points: Mapping[int, NDArray[np.float32]]  # number of a network of the bank -> logits (examples, classes)

    def check(self, name: str, number: int, logits: NDArray[np.float32], *, of_bank: bool = False) -> None:
        """Compare what a network computes now for `inputs` with what it answered when it was published.

        Args:
            name: the version, for the message.
            number: index of the member; with `of_bank`, of the network in the bank. Those that were not recorded pass.
            logits: (examples, classes).
            of_bank: see `number`.

        Raises:
            MemberError: the answers differ.
        """
        recorded = self.points.get(number) if of_bank else self.members[number]
        if recorded is None:
            return
        with np.errstate(all="ignore"):  # a NaN counts as a difference
            apart = np.abs(softmax(logits) - softmax(recorded)) if logits.shape == recorded.shape else np.array(np.inf)
        largest = float(np.nan_to_num(apart, nan=np.inf).max())
        if largest > TOLERANCE:
            raise MemberError(
                f"{name} does not pass its self-test: {'network' if of_bank else 'member'} {number} answers an example with a probability that is "
                f"{largest:.3g} away from what it answered when it was published ({TOLERANCE:g} is allowed). ONNX Runtime, or a library of its "
                "execution provider, computes wrongly on this machine: try MODEPATH_PROVIDERS=cpu, or another release."
            )


def write(folder: Path, draft: Draft) -> None:
    """Run the networks in a staged folder on the examples, and store both.

    Raises:
        MemberError: ONNX Runtime refuses a member, or it answers an example with NaN.
    """
    inputs = kinds.joined([kinds.blank(draft.input), kinds.noise(draft.input, ROWS)])
    members = [
        _finite(MemberSession(folder / member.file, "cpu").logits(inputs), member.file) for member in draft.members
    ]
    tensors: dict[str, NDArray[np.generic]] = {"inputs": inputs, "members": np.stack(members)}
    if draft.bank is not None:
        bank = Bank.load(folder / "bank")
        numbers = np.unique(np.linspace(0, len(bank) - 1, POINTS).round().astype(np.int64))
        logits = [
            _finite(
                MemberSession(bank.template, "cpu", weights=bank.weights(int(number))).logits(inputs),
                f"network {number} of the bank",
            )
            for number in numbers
        ]
        tensors |= {"points": numbers, "networks": np.stack(logits)}
    file = folder / EXAMPLES_FILE
    file.unlink(missing_ok=True)  # a copy of another version's
    files.write(file, save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))


def load(folder: Path, manifest: Manifest) -> Examples | None:
    """Read the self-test of a version; None if it was published by a release without one.

    Raises:
        CorruptionError: the file cannot be read, or breaks FORMAT.md.
    """
    if EXAMPLES_FILE not in manifest.files:
        return None
    try:
        tensors = load_file(folder / EXAMPLES_FILE)
        inputs, members = tensors["inputs"], tensors["members"]
        numbers = [int(number) for number in tensors.get("points", np.empty(0))]
        points = dict(zip(numbers, tensors.get("networks", np.empty((0, len(inputs), 0), np.float32)), strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{folder / EXAMPLES_FILE} does not hold examples ({error}): restore it from a copy, or publish again."
        ) from None
    expected = (len(manifest.members), len(inputs), len(manifest.classes))
    if members.shape != expected or any(one.shape != expected[1:] for one in points.values()):
        raise CorruptionError(
            f"{folder / EXAMPLES_FILE} breaks FORMAT.md: it does not hold an answer of every member to every example. "
            "Restore it from a copy, or publish again."
        )
    return Examples(inputs, members, points)


def _finite(logits: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise MemberError(f"{what} answers noise with NaN: its weights are broken. Train and publish it again.")
    return logits
