import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from models_store.store import Store
from tests.training.conftest import make_data
from tests.training.runs.test_checkpoint import Versioned
from training import fge, networks
from training.errors import ConfigError
from training.fge import Config
from training.members.activation import Answers, activation_refused, given_answers, outliers, refusal
from training.runs import PREFIXED, Run, save_state

LABELS = np.arange(200) % 4


def answers(accuracy, labels=LABELS, seed=0, confidence=0.9):
    """Answers of a network with this accuracy and this confidence."""
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
    assert "favour" in reason


@pytest.mark.parametrize("accuracy", [0.2, 0.25])
def test_a_version_that_is_not_better_than_chance_is_refused(accuracy):
    assert "not better than chance" in refused(answers(accuracy, confidence=0.3))


def test_a_rare_class_is_told_from_chance_by_the_nll():
    """Its accuracy is that of the most frequent class, but its NLL is far better than that of the class frequencies."""
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
    barely = [answers(a, seed=s, confidence=a) for s, a in enumerate((0.05, 0.4, 0.4))]
    assert outliers(barely, LABELS) == []


SMALL = {"network": "mlp", "batch_size": 64, "limit": 640, "members": 2, "mean": (0.3,), "std": (0.3,)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A published, active ensemble."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS_STORE", str(folder / "store"))
        patch.setenv("MODEPATH_RUNS", str(folder / "runs"))
        return fge.run(Config(name="good", epochs=12, **SMALL))


@pytest.fixture
def good(trained, monkeypatch):
    """Weights of one of its members; $MODELS_STORE is set to its store."""
    monkeypatch.setenv("MODELS_STORE", str(trained.folder.parent.parent))
    return trained.folder / trained.manifest.members[0].weights


def backwards(logits, labels):
    """A bounded loss that makes a network worse."""
    return 4 - nn.functional.cross_entropy(logits, labels).clamp(max=4)


def test_a_version_made_worse_than_what_it_began_from_is_published_but_not_served(good, tmp_path, capsys):
    ruin = {
        **SMALL,
        "name": "tuned",
        "init": (good,),
        "epochs": 2,
        "loss": "tests.training.members.test_activation:backwards",
    }
    version = fge.run(Config(**ruin))
    store = Store()
    printed = capsys.readouterr().out
    assert "NOT ACTIVATED: on the 144 validation images it is worse than the given network" in printed
    assert "python -m models_store activate tuned 1" in printed
    assert store.versions("tuned") == [1]
    assert not (store.root / "tuned" / "active").exists()
    store.verify(version)
    (folder,) = (tmp_path / "runs").glob("fge-*")
    assert "worse than the given network" in activation_refused(Run(folder, ""))
    fge.run(Config(**ruin))
    again = capsys.readouterr().out
    assert "already finished" in again
    assert "NOT ACTIVATED: on the 144 validation images it is worse" in again
    assert not (store.root / "tuned" / "active").exists()
    fge.run(Config(activate_anyway=True, **ruin))
    assert "active now because of --activate-anyway, although" in capsys.readouterr().out
    assert store.active("tuned") == 1
    fge.run(Config(activate_anyway=True, fresh=True, **ruin))
    assert "activated because of --activate-anyway" in capsys.readouterr().out
    assert store.active("tuned") == 2


def test_a_given_network_that_asks_for_the_version_of_its_weights_is_compared(tmp_path):
    network = nn.Sequential(nn.Flatten(), Versioned(6, 2))
    run = Run(tmp_path, "")
    save_state(run.start_file("given-0"), {f"network.{n}": t for n, t in network.state_dict().items()}, PREFIXED)
    data = make_data(shape=(1, 1, 6), classes=2)
    assert len(given_answers(run, network, data, 1, 16, torch.device("cpu"))) == 1


def test_a_retraining_that_is_worse_than_the_active_version_leaves_that_one_served(good, capsys):
    fge.run(Config(name="good", epochs=5, lr=1e-2, **SMALL))
    assert "worse than the active version good@1" in capsys.readouterr().out
    assert (Store().active("good"), Store().versions("good")) == (1, [1, 2])


def test_a_collapsed_member_is_left_out_by_name_and_kept_when_asked(good, tmp_path, capsys):
    collapsed = networks.build("mlp", 10, (1, 8, 8), {})
    nn.init.zeros_(list(collapsed.parameters())[-2])
    torch.save(collapsed.state_dict(), tmp_path / "collapsed.pt")
    # At these rates neither network moves: the first three members are good; the collapsed one and its two are not.
    options = {**SMALL, "epochs": 2, "init": (good, tmp_path / "collapsed.pt"), "alpha_1": 1e-4, "alpha_2": 1e-5}
    version = fge.run(Config(name="chosen", **options))
    printed = capsys.readouterr().out
    assert all(f"left out of the average: member {index} of 6" in printed for index in (1, 4, 5))
    assert printed.count("left out") == 3
    Store().verify(version)
    members = version.manifest.members
    assert [m.file for m in members] == [f"members/{i:03d}.onnx" for i in range(3)]
    assert [m.weight for m in members] == [1 / 3] * 3
    assert all(m.validation.accuracy > 0.8 for m in members)
    everyone = fge.run(Config(name="chosen", keep_all_members=True, **options))
    assert len(everyone.manifest.members) == 6
    assert "left out" not in capsys.readouterr().out


def test_neither_serving_nor_keeping_changes_the_identity_of_a_run():
    record = Config().deciding()
    assert not {"activate_anyway", "keep_all_members"} & set(record)
    assert Config(activate_anyway=True).deciding() == record
    assert Config(keep_all_members=True).deciding()["keep_all_members"] is True
    with pytest.raises(ConfigError, match="contradict"):
        Config(activate=False, activate_anyway=True)
