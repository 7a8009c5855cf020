"""A single network equals torch's network at its point, including batch norm, for curves and simplexes."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models_store.bank import Bank
from models_store.graphs.runtime import MemberSession
from models_store.store import Store
from models_store.uncertainty import softmax
from service.inference.batching import Batcher, QueueLimits
from service.inference.ensemble import Ensembles
from service.inference.policy import Policy
from tests.training.conftest import SMALL
from training import curve, data, espro, networks
from training.geometry.vertices import combine
from training.members import member

LIMITS = QueueLimits(batch_rows=16, batch_seconds=10, rows=1000, seconds=60)


@pytest.mark.parametrize(
    ("door", "options"),
    [
        (curve, {"epochs": 4, "bank": 7, "members": 2}),
        (espro, {"epochs": 2, "bank": 7, "samples": 2, "vertices": 2, "vertex_epochs": 2}),
    ],
    ids=["curve", "simplex"],
)
def test_a_query_is_answered_as_torch_answers_at_its_point(door, options):
    config = door.Config(name="path", **SMALL, **options)
    version = door.run(config)
    splits = data.load(config.data_options())
    images, labels = data.as_arrays(splits.test)
    every, truth = images, labels
    images, labels = images[:60], labels[:60]
    policies = {"path": Policy(modes=("random",), probabilities="exact", point=True)}
    ensemble = Ensembles(Store(Path(os.environ["MODELS_STORE"])), "cpu", None, policies=policies).open("path", 1)
    rows = ensemble.rows("random", images)
    batcher = Batcher(LIMITS, 2)
    answer = asyncio.run(batcher.run(ensemble.sessions["random"], rows))
    asked = [asyncio.run(batcher.run(ensemble.sessions["random"], ensemble.rows("random", every))) for _ in range(60)]
    batcher.close()
    bank = Bank.load(version.folder / "bank")
    alone = [MemberSession(bank.template, "cpu", 1, bank.weights(point)).logits(every) for point in range(len(bank))]
    mean = np.mean([logits.argmax(1) == truth for logits in alone])
    assert abs(np.mean([one.prediction.label == truth for one in asked]) - mean) < 0.005

    vertices = [load_file(version.folder / file) for file in version.manifest.geometry.vertices]
    network = networks.build("preresnet8", 10, splits.shape, {"width": 0.25})
    placed = data.on_device(splits, torch.device("cpu"))
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (splits.mean, splits.std))
    drawn = np.array([one.number for one in rows.networks])
    assert len(set(drawn.tolist())) > 3
    for point in set(drawn.tolist()):
        network.load_state_dict(combine(vertices, bank.coefficients[point]))
        member.settle(network, placed, config.bn_images, torch.device("cpu"))
        mine = drawn == point
        with torch.no_grad():
            logits = network.eval()((torch.from_numpy(images[mine]) - mean) / std).numpy()
        expected = softmax(logits, bank.temperature[point])
        assert answer.prediction.mean_probs[mine] == pytest.approx(expected, abs=1e-4)
