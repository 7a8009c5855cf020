from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.conftest import make_data
from training.config import Config
from training.geometry.vertices import combine
from training.optimisation import hardware
from training.optimisation.steps import BetweenVertices, Span, Step, Training, pull_of

RATE, DECAY = 0.1, 0.05
POINTS = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.05, 0.05, 0.9]])
IMAGES, LABELS = torch.randn(8, 4), torch.arange(8) % 3


@pytest.mark.parametrize("points", [POINTS[:1], POINTS], ids=["one", "three"])
@pytest.mark.parametrize("push", [None, np.array([[0.3, -0.1, -0.2]])], ids=["loss", "loss and push"])
def test_a_step_descends_the_mean_loss_of_the_drawn_points(points, push):
    """Compared with the definition: autograd through w(c) = Σ c_v w_v, of loss and L2 at w(c), averaged over points."""
    config = Config(precision="32", device="cpu", weight_decay=DECAY, momentum=0.0)
    fabric, network = hardware.launch(config), nn.Linear(4, 3)
    network(IMAGES).square().sum().backward()  # gradients as an earlier leg leaves them
    fixed = [{name: torch.randn_like(t) for name, t in network.state_dict().items()} for _ in range(2)]
    begun = {name: torch.randn_like(t) for name, t in network.state_dict().items()}
    span = Span(
        vertices=(Path(), Path(), None),
        begin=lambda others, trained: [begun],
        draw=lambda generator, places: points,
        shown=points[0],
        push=None if push is None else lambda places: push,
    )
    steps = BetweenVertices(Training(config, fabric, network, make_data()), span, fixed, set())
    step = Step(iteration=1, rate=RATE, generator=np.random.default_rng(0), images=64)
    told = steps.take(pull_of(lambda: functional.cross_entropy(network(IMAGES), LABELS)), step)

    free = {name: tensor.clone().requires_grad_() for name, tensor in begun.items()}
    losses, total = [], torch.zeros(())
    for point in points:
        at = {n: sum(c * s[n] for c, s in zip(point.tolist(), [*fixed, free], strict=True)) for n in free}
        losses.append(functional.cross_entropy(functional.linear(IMAGES, at["weight"], at["bias"]), LABELS))
        total = total + (losses[-1] + DECAY / 2 * sum(w.square().sum() for w in at.values())) / len(points)
    total.backward()
    pushed = (
        combine([*fixed, begun], push[0]) if push is not None else {n: torch.zeros_like(t) for n, t in free.items()}
    )
    (found,) = steps.collected()
    for name, tensor in free.items():
        assert torch.allclose(found[name], begun[name] - RATE * (tensor.grad + pushed[name]), atol=1e-6), name
    assert told.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
