"""Networks of the methods' own plans, trained and measured without being published. Trainings resume after a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models_store.decisions import temperature
from models_store.uncertainty import Floats, softmax
from training import data
from training.config import Config
from training.data import Data, Split
from training.geometry.vertices import State, combine, coordinates, put_into
from training.members import member
from training.members.metrics import accuracy, score
from training.networks import layout
from training.networks.normaliser import Normaliser
from training.optimisation.loop import Leg
from training.optimisation.session import Session
from training.pipeline import Plan, Trained
from training.runs import PREFIXED, Run, load_weights, save_state

Labels = NDArray[np.int64]


class Trainer:
    """Trains legs on data that is loaded once."""

    def __init__(self, loaded: Data, folder: Path):
        self.data, self._folder = loaded, folder

    def session(self, config: Config) -> Session:
        """A session of these options on the data."""
        return Session.of(config, self.data)

    def run(self, name: str) -> Run:
        """The run that keeps what is trained under this name."""
        return Run(self._folder / name, name)

    def train(
        self, name: str, config: Config, plan: Callable[[Config, Run, int], Plan], given: Sequence[Path] = ()
    ) -> list[State]:
        """The networks that the method's plan would publish, before batch norm is re-estimated.

        Args:
            name: of the run; another training needs another name.
            config: the method's options.
            plan: of the method.
            given: files of the weights that `config.given()` names.
        """
        session, run = self.session(config), self.run(name)
        for index, file in enumerate(given):
            self.start(run.start_file(f"given-{index}"), load_weights(file))
        for index in range(config.initial_networks()):
            self.start(run.start_file(f"fresh-{index}"), session.initialised(index).state_dict())
        planned = plan(config, run, session.steps_per_epoch)
        self.train_legs(run, session, planned.legs)
        if planned.build_vertices:
            planned.build_vertices(Trained(session.network, session.data_on_device, session.fabric.device))
        states = [load_weights(file) for file, _ in planned.vertices]
        if planned.points is None:
            return states
        parameters = [key for key, _ in session.network.named_parameters()]
        return [combine(states, row) for row in planned.points.members(coordinates(states, parameters))]

    def start(self, file: Path, state: State) -> None:
        """Write what a leg starts from."""
        if not file.exists():  # it exists if the run is resumed
            save_state(file, {f"network.{name}": tensor for name, tensor in state.items()}, PREFIXED)

    def train_legs(self, run: Run, session: Session, legs: Sequence[Leg]) -> None:
        """Train the legs, unless the run has."""
        if run.progress().leg < len(legs):
            session.train(run, legs)
            run.save_checkpoint({}, type(run.progress())(len(legs), 0, run.progress().seconds))


@dataclass(frozen=True)
class Answers:
    """What networks say of the images."""

    validation: Floats  # logits (networks, batch, classes)
    test: Floats
    train_accuracy: NDArray[np.float64]  # (networks,), on clean training images
    labels: Labels  # of validation
    test_labels: Labels

    def take(self, which: slice | Sequence[int]) -> Answers:
        """Some of the networks."""
        return Answers(
            self.validation[which], self.test[which], self.train_accuracy[which], self.labels, self.test_labels
        )

    def with_(self, *others: Answers) -> Answers:
        """The networks of several together."""
        found = (self, *others)
        return Answers(
            np.concatenate([one.validation for one in found]),
            np.concatenate([one.test for one in found]),
            np.concatenate([one.train_accuracy for one in found]),
            self.labels,
            self.test_labels,
        )

    def scores(self) -> dict[str, float]:
        """Of the average with equal weights, at the temperature that validation fits; and of the networks themselves."""
        weights = np.full(len(self.test), 1 / len(self.test))
        fitted = temperature.fit(self.validation, self.labels, weights)
        found: dict[str, float] = {"networks": len(self.test), "temperature": fitted}
        for name, logits, labels in (
            ("validation", self.validation, self.labels),
            ("test", self.test, self.test_labels),
        ):
            probs = softmax(logits, fitted)
            mean = score(np.tensordot(weights, probs, 1), labels)
            found |= {f"{name}_error": 1 - mean.accuracy, f"{name}_nll": mean.nll, f"{name}_ece": mean.ece}
            found[f"{name}_member_error"] = float(np.mean([1 - accuracy(own, labels) for own in probs]))
        found["train_accuracy"] = float(self.train_accuracy.mean())
        found["disagreement"] = self.disagreement()
        return found

    def disagreement(self) -> float:
        """Mean share of test images of which two of the networks have different labels; NaN of a single one."""
        labels = self.test.argmax(axis=2)
        pairs = [(labels[a] != labels[b]).mean() for a in range(len(labels)) for b in range(a)]
        return float(np.mean(pairs)) if pairs else float("nan")


@torch.inference_mode()
def answers(session: Session, states: Sequence[State]) -> Answers:
    """Of each network after its batch norm is re-estimated on the training images."""
    network, found, device = session.network, session.data_on_device, session.fabric.device
    network.to(device)
    kept: dict[str, list[Floats]] = {"train": [], "validation": [], "test": []}
    labels: dict[str, Labels] = {}
    for state in states:
        put_into(network, state)
        member.settle(network, found, session.config.bn_images, device)
        network.eval()
        for name in kept:
            logits, labels[name] = _logits(network, found, getattr(found, name), device)
            kept[name].append(logits)
    right = np.array([accuracy(own, labels["train"]) for own in kept["train"]])
    return Answers(np.stack(kept["validation"]), np.stack(kept["test"]), right, labels["validation"], labels["test"])


def _logits(network, found: Data, split: Split, device) -> tuple[Floats, Labels]:
    normalise, memory_format = Normaliser.of(found).to(device), layout.of(network)
    logits, labels = [], []
    for images, known in split.batches(data.in_order(split), 128):
        logits.append(network(layout.arrange(normalise(images.to(device)), memory_format)).float().cpu().numpy())
        labels.append(known.cpu().numpy())
    return np.concatenate(logits), np.concatenate(labels)
