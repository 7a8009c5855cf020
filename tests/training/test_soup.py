import numpy as np
import pytest
import torch

from models_store.store import Store
from tests.training.conftest import SMALL
from training import networks, soup
from training.errors import ConfigError
from training.members.activation import Answers
from training.runs import Run
from training.soup import Config, greedy, plan


def answers(accuracy):
    return Answers(np.arange(100) < 100 * accuracy, np.full(100, 1 - accuracy))


def state(value):
    return {"w": torch.tensor([float(value)])}


def test_candidates_stay_in_the_order_of_their_accuracy_while_the_average_is_no_worse():
    """Wortsman et al. 2022, recipe 1, by hand: it tries the averages 4; (4, 2) = 3; (4, 2, 9) = 5; (4, 2, 0) = 2."""
    accuracy = {3.0: 0.9, 5.0: 0.5, 2.0: 0.9}
    tried = []

    def judge(average):
        tried.append(average["w"].item())
        return answers(accuracy[tried[-1]])

    states = [state(9), state(4), state(0), state(2), state(float("nan"))]
    found = greedy(states, [answers(0.7), answers(0.8), answers(0.6), answers(0.75), None], judge)
    assert tried == [3.0, 5.0, 2.0]
    assert found["w"].item() == 2.0


def test_an_average_that_answers_nothing_finite_is_not_taken():
    assert greedy([state(1), state(3)], [answers(0.5), answers(0.4)], lambda average: None)["w"].item() == 1.0


def test_candidates_are_the_last_epochs_of_a_training_at_each_rate(tmp_path):
    run = Run(tmp_path, "")
    planned = plan(Config(epochs=6, last=2, rates=(0.1, 0.01)), run, 10)
    assert [leg.collect for leg in planned.legs] == [(50, 60)] * 2
    assert [leg.rate(1) for leg in planned.legs] == [0.1, 0.01]
    assert {leg.start for leg in planned.legs} == {run.start_file("fresh-0")}


@pytest.mark.parametrize("options", [{"runs": 2}, {"last": 0}, {"last": 41}, {"rates": (0.1, 0.0)}])
def test_what_cannot_be_carried_out_is_refused(options):
    with pytest.raises(ConfigError):
        Config(**options)


def test_one_member_is_published_and_a_given_network_is_where_it_begins(tmp_path):
    network = networks.build("preresnet8", 10, (1, 8, 8), {"width": 0.25})
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    options = {**SMALL, "epochs": 3, "last": 2, "rates": (0.1, 0.03)}
    version = soup.run(Config(name="s", init=tmp_path / "mine.pt", mean=(0.3,), std=(0.3,), **options))
    Store().verify(version)
    (member,) = version.manifest.members
    assert (member.weight, member.origin.leg) == (1.0, "soup")
    assert version.manifest.provenance.epochs_spent == pytest.approx(6)
