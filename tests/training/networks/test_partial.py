import pytest
import torch
from torch import nn

from training.errors import NetworkError
from training.members import batch_norm
from training.networks import partial


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(32, 3))


def test_only_what_the_patterns_name_is_trained():
    one = network()
    partial.freeze(one, ["4.*"], [])
    assert [name for name, p in one.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]
    assert partial.trained_share(one) == pytest.approx(99 / (99 + 18 + 2 + 4))
    other = network()
    partial.freeze(other, [], ["0.*", "1.*"])
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]


def test_frozen_batch_norm_stays_as_it_was_given_in_training_and_afterwards():
    one = network()
    partial.freeze(one, ["4.*"], [])
    one.get_buffer("1.running_mean").fill_(0.3)
    partial.training_mode(one)
    assert [module.training for module in one] == [False, False, True, True, True]
    images = torch.rand(8, 1, 6, 6)
    one(images)
    assert batch_norm.statistics(one, images) == set()
    batch_norm.reestimate(one, [images])
    assert (one.get_buffer("1.running_mean") == 0.3).all()
    free = network()
    partial.training_mode(free)
    assert all(module.training for module in free)
    assert batch_norm.statistics(free, images) == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("train", "frozen", "told"), [(["head.*"], [], "fits 'head"), ([], ["*"], "leave no parameter")]
)
def test_patterns_that_fit_nothing_or_everything_are_refused(train, frozen, told):
    with pytest.raises(NetworkError, match=told):
        partial.freeze(network(), train, frozen)
