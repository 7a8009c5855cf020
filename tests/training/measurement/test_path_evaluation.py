from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from models_store.graphs.runtime import EnsembleSession
from tests.training.conftest import SMALL
from training import curve, data, evaluate, fge, networks
from training.errors import ConfigError
from training.members.metrics import accuracy


def test_the_path_and_the_segment_meet_at_the_ends_and_scores_are_those_of_the_members(here):
    report = evaluate.run(evaluate.Config(name="c", path=True, points=5))
    ways = report["ways"]
    assert list(ways) == ["bezier", "segment"]
    for column, line in ways["bezier"]["series"].items():
        straight = ways["segment"]["series"][column]
        assert (line[0], line[-1]) == (straight[0], straight[-1]), column
    assert ways["segment"]["length_ratio"] == pytest.approx(1)
    assert ways["bezier"]["length_ratio"] > 1
    # t = 0, ½, 1 are the members 0, 1, 2.
    found = data.load(curve.Config(**SMALL).data_options())
    images, labels = data.as_arrays(found.test)
    probs = EnsembleSession(here.folder, here.manifest).member_probs(images)
    errors = [1 - accuracy(one, labels) for one in probs]
    assert [ways["bezier"]["series"]["test_error"][i] for i in (0, 2, 4)] == pytest.approx(errors, abs=1e-9)
    assert ways["bezier"]["series"]["temperature"][2] == pytest.approx(here.manifest.members[1].temperature, rel=1e-2)
    summary = ways["segment"]["summary"]["test_error"]
    line = np.array(ways["segment"]["series"]["test_error"])
    assert summary["mean_over_t"] == pytest.approx(np.trapezoid(line, dx=0.25))
    assert summary["mean_over_length"] == pytest.approx(summary["mean_over_t"])
    assert {"path.md", "path.json", "path.png"} <= {file.name for file in Path("evaluation/c-1").iterdir()}


def test_the_l2_term_is_the_one_of_sgd(here):
    (value,) = [
        evaluate.run(evaluate.Config(name="c", path=True, points=2, train_images=100))["ways"]["segment"]["series"]
    ]
    weights = load_file(here.folder / "weights/000.safetensors")
    network = networks.build("preresnet8", 10, (1, 8, 8), {"width": 0.25})
    squares = sum(float(weights[name].double().square().sum()) for name, _ in network.named_parameters())
    assert value["train_loss"][0] - value["train_nll"][0] == pytest.approx(3e-4 / 2 * squares, rel=1e-5)


def test_a_subset_is_said(here):
    report = evaluate.run(evaluate.Config(name="c", path=True, points=2, train_images=100, limit=50))
    assert "on 100 of 640 training images (clean), test on 50 of 360" in report["measured_on"]


def test_what_is_no_curve_is_told(here, monkeypatch, tmp_path):
    monkeypatch.setenv("MODELS_STORE", str(tmp_path / "other"))
    fge.run(fge.Config(name="f", epochs=5, members=1, **SMALL))
    with pytest.raises(ConfigError, match="is not a curve"):
        evaluate.run(evaluate.Config(name="f", path=True))
