import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from models_store.store import Store
from training import fge, networks
from training.activation import Answers, activation_refused, outliers, refusal
from training.errors import ConfigError
from training.fge import Config
from training.runs import Run

LABELS = np.arange(200) % 4


def answers(accuracy, labels=LABELS, seed=0, confidence=0.9):
    """A network that is right on so large a share of the images, and as confident as that."""
    rng = np.random.default_rng(seed)
    right = np.zeros(len(labels), bool)
    right[rng.permutation(len(labels))[: round(accuracy * len(labels))]] = True
    return Answers(right, np.where(right, -np.log(confidence), -np.log((1 - confidence) / 3)))


def refused(version, given=(), active=None, labels=LABELS, cut=False):
    return refusal(version, labels, given, active, fingerprint="f", classes=list("abcd"), validation_cut=cut)


def test_a_version_worse_than_the_given_network_is_refused_with_both_scores():
    reason = refused(answers(0.85, confidence=0.85), [answers(0.94, seed=1, confidence=0.94)])
    assert "worse than the given network: accuracy 0.8500" in reason
    assert "against accuracy 0.9400" in reason


def test_a_difference_within_noise_is_not_refused():
    assert refused(answers(0.93, seed=2), [answers(0.94, seed=1)]) is None


def test_of_several_given_networks_the_best_counts():
    assert refused(answers(0.85), [answers(0.5, confidence=0.5), answers(0.97, seed=1, confidence=0.97)]) is not None


def test_a_worse_nll_is_refused_where_the_accuracy_is_equal():
    sure, unsure = answers(0.9, confidence=0.9), answers(0.9, confidence=0.5)
    assert refused(unsure, [sure]) is not None
    assert refused(sure, [unsure]) is None


def test_images_that_a_given_network_may_know_are_mentioned():
    reason = refused(answers(0.8), [answers(0.97, seed=1, confidence=0.97)], cut=True)
    assert "flatter" in reason


@pytest.mark.parametrize("accuracy", [0.2, 0.25])
def test_a_version_that_is_not_better_than_chance_is_refused(accuracy):
    assert "not better than chance" in refused(answers(accuracy, confidence=0.3))


def test_a_rare_class_is_told_from_chance_by_the_nll():
    """Never more accurate than the most frequent class, yet far better than the class frequencies."""
    labels = (np.arange(400) % 20 == 0).astype(int)
    nll = np.where(labels == 1, -np.log(0.45), -np.log(0.99))
    version = Answers(labels == 0, nll)
    assert refusal(version, labels, [], None, fingerprint="f", classes=["0", "1"], validation_cut=False) is None


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_a_version_that_is_right_on_few_images_is_activated(count):
    labels = np.arange(count) % 3
    right = Answers(np.ones(count, bool), np.full(count, 0.05))
    assert refused(right, labels=labels) is None


def test_the_rate_of_refusals_of_equal_networks_is_that_of_the_level():
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(300):
        right = rng.random((2, 400)) < 0.9
        nll = np.where(right, 0.1, 2.0) * rng.lognormal(0, 0.5, right.shape)
        one, other = (Answers(r, n) for r, n in zip(right, nll, strict=True))
        count += refused(one, [other], labels=np.arange(400) % 4) is not None
    # Two tests at 1 % each, at most 2 % together.
    assert count <= stats.binom.ppf(0.999, 300, 0.02)


def test_a_collapsed_member_is_an_outlier_and_worse_ones_within_reason_are_not():
    healthy = [answers(a, seed=s) for s, a in enumerate((0.9, 0.88, 0.85, 0.8))]
    assert outliers(healthy, LABELS) == []
    assert outliers([*healthy, answers(0.25, confidence=0.26)], LABELS) == [4]
    assert outliers([answers(0.25, confidence=0.26), healthy[0]], LABELS) == [0]


def test_members_that_have_all_learned_nothing_are_no_outliers():
    assert outliers([answers(a, seed=s, confidence=0.26) for s, a in enumerate((0.2, 0.25, 0.3))], LABELS) == []


SMALL = {"network": "mlp", "batch_size": 64, "limit": 640, "members": 2, "mean": (0.3,), "std": (0.3,)}


@pytest.fixture
def good(tmp_path):
    """A checkpoint of a trained network."""
    version = fge.run(Config(name="good", epochs=20, **SMALL))
    return version.folder / version.manifest.members[0].weights


def run_folder(tmp_path):
    folders = list((tmp_path / "runs").glob("fge-*/activation.json"))
    newest = max(folders, key=lambda file: file.stat().st_mtime).parent
    return Run(newest, "")


def test_a_version_made_worse_than_what_it_began_from_is_published_but_not_served(good, tmp_path, capsys):
    # A rate that ruins the network within the cycles.
    ruin = {**SMALL, "name": "tuned", "init": (good,), "epochs": 1, "alpha_1": 3.0, "alpha_2": 2.9}
    version = fge.run(Config(**ruin, keep_all_members=True))
    store = Store()
    said = capsys.readouterr().out
    assert "NOT ACTIVATED: on the" in said
    assert "worse than the given network" in said
    assert "python -m models_store activate tuned 1" in said
    assert store.versions("tuned") == [1]
    assert not (store.root / "tuned" / "active").exists()
    assert "worse than the given network" in activation_refused(run_folder(tmp_path))
    store.verify(version)
    # Repeating the finished command changes nothing.
    fge.run(Config(**ruin, keep_all_members=True))
    assert not (store.root / "tuned" / "active").exists()
    # Unless it is wanted.
    fge.run(Config(**ruin, keep_all_members=True, activate_anyway=True, fresh=True))
    assert "activated because of --activate-anyway" in capsys.readouterr().out
    assert store.active("tuned") == 2


def test_a_retraining_that_is_worse_than_the_active_version_leaves_that_one_served(capsys):
    fge.run(Config(name="d", epochs=20, **SMALL))
    fge.run(Config(name="d", epochs=2, lr=1e-3, **SMALL))
    assert "worse than the active version d@1" in capsys.readouterr().out
    assert (Store().active("d"), Store().versions("d")) == (1, [1, 2])


def test_a_collapsed_member_is_left_out_by_name_and_kept_when_asked(good, tmp_path, capsys):
    torch.manual_seed(0)
    collapsed = networks.build("mlp", 10, (1, 8, 8), {})
    nn.init.zeros_(list(collapsed.parameters())[-2])
    torch.save(collapsed.state_dict(), tmp_path / "collapsed.pt")
    options = {**SMALL, "epochs": 4, "init": (good, tmp_path / "collapsed.pt"), "alpha_1": 0.02}
    version = fge.run(Config(name="chosen", **options))
    assert "left out of the average: member 1 of" in capsys.readouterr().out
    Store().verify(version)
    members = version.manifest.members
    assert [m.file for m in members] == [f"members/{i:03d}.onnx" for i in range(len(members))]
    assert [m.weight for m in members] == [1 / len(members)] * len(members)
    everyone = fge.run(Config(name="chosen", keep_all_members=True, **options))
    assert len(everyone.manifest.members) == len(members) + 1
    assert "left out" not in capsys.readouterr().out


def test_neither_serving_nor_keeping_changes_the_identity_of_a_run():
    record = Config().deciding()
    assert not {"activate_anyway", "keep_all_members"} & set(record)
    assert Config(activate_anyway=True).deciding() == record
    assert Config(keep_all_members=True).deciding()["keep_all_members"] is True
    with pytest.raises(ConfigError, match="contradict"):
        Config(activate=False, activate_anyway=True)
