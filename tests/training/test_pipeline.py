import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from onnx import load_from_string, numpy_helper

from models_store import lineage
from models_store.graphs.runtime import EnsembleSession
from models_store.importing import ImportOptions, import_members
from models_store.store import Store
from models_store.uncertainty import softmax
from tests.training.conftest import SMALL
from training import independent, pipeline


def run(capsys, **options):
    """Train for a few seconds, and activate the result even if it has learnt nothing yet."""
    small = {**SMALL, "epochs": 1, "bn_images": 64, "limit": 128, "activate_anyway": True}
    version = independent.run(independent.Config(name="n", **{**small, **options}))
    return version, capsys.readouterr().out


@pytest.fixture
def stopped(capsys):
    """Version 1, published by a run that was stopped before it activated the version."""
    with mock.patch.object(Store, "_activate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(capsys)
    assert Store().names() == ["n"]
    assert Store().activation_order() == []


def test_the_same_command_activates_what_it_had_published_when_it_was_stopped(stopped, capsys):
    version, said = run(capsys)
    assert "already finished: this run published n@1" in said
    assert "n@1 is active now" in said
    assert version.manifest.version == Store().active("n") == 1
    assert "active now" not in run(capsys)[1]


def test_it_does_so_only_where_it_is_to_activate(stopped, capsys):
    assert "active now" not in run(capsys, activate=False, activate_anyway=False)[1]
    assert Store().activation_order() == []


def test_the_same_command_leaves_what_was_activated_since(capsys):
    run(capsys)
    run(capsys, seed=1)
    Store().activate("n", 1)
    assert "active now" not in run(capsys, seed=1)[1]
    assert Store().active("n") == 1


def test_copies_of_trained_members_are_related_however_they_are_rounded_and_networks_trained_apart_are_not(
    capsys, tmp_path
):
    version, _ = run(capsys, runs=2)
    known = lineage.marks(version)
    apart = lineage.marks(run(capsys, seed=1)[0])
    assert not lineage.related(known, apart)
    for change in (torch.float16, torch.bfloat16):
        model = load_from_string((version.folder / "members/001.onnx").read_bytes())
        for tensor in model.graph.initializer:
            if tensor.data_type == tensor.FLOAT:
                rounded = torch.from_numpy(np.array(numpy_helper.to_array(tensor))).to(change)
                tensor.CopyFrom(numpy_helper.from_array(rounded.float().numpy(), tensor.name))
        (tmp_path / "copy.onnx").write_bytes(model.SerializeToString())
        copy = import_members(Store(), "copy", [tmp_path / "copy.onnx"], ImportOptions())
        assert lineage.related(known, lineage.marks(copy))
        assert not lineage.related(apart, lineage.marks(copy))


def test_a_method_may_weigh_its_members_by_their_validation_answers(capsys):
    """Weights are proportional to the members' correct answers, and the published average uses them."""
    seen = []

    def weigh(logits, labels):
        right = (logits.argmax(axis=2) == labels).sum(axis=1) + 1.0
        seen.append(right / right.sum())
        return seen[-1]

    def plan(config, this_run, steps):
        return dataclasses.replace(independent.plan(config, this_run, steps), weigh=weigh)

    options = {**SMALL, "epochs": 1, "runs": 2, "limit": 128, "bn_images": 64, "keep_all_members": True}
    version = pipeline.run(independent.Config(name="weighed", **options), plan)
    assert [member.weight for member in version.manifest.members] == pytest.approx(seen[0].tolist())
    session = EnsembleSession(version.folder, version.manifest)
    images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    probs = softmax(session.logits(images), version.manifest.temperature)
    assert session.combine(probs).mean_probs == pytest.approx(np.einsum("k,kbc->bc", seen[0], probs))
