import numpy as np
import pytest
import torch
from torch import nn

from tests.training.members.test_export import Odd
from training.geometry import volume
from training.geometry.coefficients import curve, distances
from training.geometry.vertices import Vertices, combine, coordinates


def states(make, count):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append({k: v.clone() for k, v in make().state_dict().items()})
    return found


def test_a_combination_is_the_weighted_sum_and_a_vertex_is_itself_bit_for_bit():
    three = states(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), 3)
    c = np.array([0.2, 0.5, 0.3])
    found = combine(three, c)
    for name, tensor in found.items():
        expected = sum(w * s[name].double() for w, s in zip(c, three, strict=True))
        assert torch.allclose(tensor.double(), expected, atol=1e-6)
    for vertex in range(3):
        assert all(torch.equal(t, three[vertex][k]) for k, t in combine(three, np.eye(3)[vertex]).items())


def test_what_all_vertices_share_is_not_rounded_and_integers_come_from_the_nearest():
    shared = torch.tensor(1.7)
    two = [{"scale": shared, "count": torch.tensor(3)}, {"scale": shared.clone(), "count": torch.tensor(9)}]
    found = combine(two, [0.3, 0.7])
    assert torch.equal(found["scale"], shared)
    assert found["count"] == 9


def test_coordinates_keep_lengths_and_angles_of_the_flat_weights():
    three = states(lambda: nn.Linear(5, 4), 3)
    flat = np.stack([np.concatenate([s["weight"].flatten(), s["bias"]]) for s in three]).astype(np.float64)
    found = coordinates(three, ["weight", "bias"])
    assert found @ found.T == pytest.approx(flat @ flat.T, rel=1e-12)


def test_coordinates_keep_a_small_height_over_long_vectors():
    """|w| = 100 and height 1e-9: inner products would have to resolve 1e-18 next to 1e4."""
    base = {"w": torch.zeros(8, dtype=torch.float64)}
    base["w"][0] = 100
    along, beside = base["w"].clone(), base["w"].clone()
    along[1] = 1
    beside[1], beside[2] = 0.5, 1e-9
    found = coordinates([base, {"w": along}, {"w": beside}], ["w"])
    edges = found[1:] - found[0]
    height = np.linalg.norm(edges[1] - edges[0] * (edges[1] @ edges[0]) / (edges[0] @ edges[0]))
    assert height == pytest.approx(1e-9, rel=1e-3)


class Small(nn.Module):
    """A network in float64 with a tied weight and a buffer that differs between vertices."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.rand(()))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x))) * self.scale))


@pytest.mark.parametrize("shape", ["bezier", "polychain"])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9])
def test_gradients_of_the_bends_are_finite_differences(shape, t):
    """Gradients of the loss with L2 at the point, compared with central differences in float64, for two bends."""
    decay, four = 0.1, states(Small, 4)
    network = Small()
    vertices = Vertices(network, four, [1, 2], set())
    c = curve(shape, t, 2)[0]
    x, y = torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 2

    def loss():
        vertices.load_point(c)
        l2 = sum((p**2).sum() for p in network.parameters())
        return nn.functional.cross_entropy(network(x), y) + decay / 2 * l2

    vertices.load_point(c)
    nn.functional.cross_entropy(network(x), y).backward()
    vertices.pull_back(c, decay)
    assert all(p.grad is None for p in network.parameters())
    for bend in (1, 2):
        for name, weight in vertices.named_trained(bend).items():
            flat, found = weight.detach().view(-1), weight.grad.view(-1)
            for i in range(0, len(flat), 3):
                with torch.no_grad():
                    kept = flat[i].item()
                    flat[i] = kept + 1e-5
                    above = loss()
                    flat[i] = kept - 1e-5
                    below = loss()
                    flat[i] = kept
                assert found[i].item() == pytest.approx((above - below).item() / 2e-5, abs=1e-7), name


def test_several_points_add_up():
    three = states(Small, 3)
    network = Small()
    vertices = Vertices(network, three, [1], set())
    x, total = torch.rand(4, 3, dtype=torch.float64), {}
    for t in (0.3, 0.8):
        c = curve("bezier", t, 1)[0]
        vertices.load_point(c)
        network.zero_grad()
        network(x).sum().backward()
        for name, parameter in network.named_parameters():
            total[name] = total.get(name, 0) + c[1] * parameter.grad / 2
        vertices.pull_back(c, 0.0, 0.5)
    assert all(torch.allclose(w.grad, total[name]) for name, w in vertices.named_trained(1).items())


def test_points_that_use_different_parameters_add_up():
    """A module may skip layers at random, as LayerDrop does, so that each pass computes other gradients."""
    three = states(Small, 3)
    network = Small()
    vertices = Vertices(network, three, [1], set())
    total = {}
    for t, used in ((0.3, ["a", "b"]), (0.5, ["b"]), (0.8, ["a", "head"])):
        c = curve("bezier", t, 1)[0]
        vertices.load_point(c)
        loss = sum((p**3).sum() for name, p in network.named_parameters() if name.split(".")[0] in used)
        loss.backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + c[1] * parameter.grad / 3
        vertices.pull_back(c, 0.0, 1 / 3)
    found = vertices.named_trained(1)
    assert {name for name, weight in found.items() if weight.grad is not None} == total.keys()
    assert all(torch.allclose(found[name].grad, gradient) for name, gradient in total.items())


def test_placing_writes_the_combination_into_any_module():
    three = states(Odd, 3)
    network = Odd()
    vertices = Vertices(network, three, [1], set())
    c = curve("bezier", 0.3, 1)[0]
    vertices.load_point(c)
    expected = combine(three, c)
    assert all(torch.allclose(t, expected[k], atol=1e-6) for k, t in network.state_dict().items())
    assert network.first.weight is network.second.weight
    vertices.load_point(np.array([0, 0, 1.0]))
    assert all(torch.equal(t, three[2][k]) for k, t in network.state_dict().items())
    assert all(torch.equal(t, three[1][k]) for k, t in vertices.state(1).items())


def test_a_frozen_parameter_is_not_trained():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    vertices = Vertices(network, states(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 3), [1], set())
    assert len(vertices.trained()) == 2
    c = np.array([0.25, 0.5, 0.25])
    vertices.load_point(c)
    network(torch.rand(3, 2)).sum().backward()
    vertices.pull_back(c, 0.1)
    assert all(w.grad is not None for w in vertices.trained())


def test_coordinates_follow_the_free_vertex_as_it_moves():
    four = states(Small, 4)
    network = Small()
    names = [name for name, _ in network.named_parameters()]
    vertices = Vertices(network, four, [3], set())

    def agree(now):
        return distances(vertices.coordinates()) == pytest.approx(distances(coordinates(now, names)), abs=1e-6)

    assert agree(four)
    with torch.no_grad():
        for weight in vertices.trained():
            weight.add_(0.25)
    assert agree([*four[:3], vertices.state(3)])
    assert not agree(four)


def test_a_combination_of_many_weights_is_flat_in_a_step_too():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2_000_000))

    first, second = ({"weight": torch.randn(2_000_000)} for _ in range(2))
    between = {"weight": 0.3 * first["weight"] + 0.7 * second["weight"]}
    for end in (second, {"weight": first["weight"] + 1e-3 * second["weight"]}):  # far apart, and nearly equal
        middle = {"weight": 0.5 * first["weight"] + 0.5 * end["weight"]}
        places = Vertices(Wide(), [first, end, middle], [2], set()).coordinates()
        assert volume.log_volume(places) == -np.inf
        assert volume.gradient(places, [[0, 1, 2]], 2).tolist() == [0, 0, 0]
    assert volume.log_volume(Vertices(Wide(), [first, second, between], [2], set()).coordinates()) == -np.inf


def test_where_a_vertex_is_not_finite_nothing_pushes_and_nothing_raises():
    three = states(Small, 4)
    vertices = Vertices(Small(), three, [3], set())
    with torch.no_grad():
        vertices.trained()[0].fill_(float("nan"))
    places = vertices.coordinates()
    assert np.isnan(places).all()
    simplexes = [[0, 1, 3], [1, 2, 3]]
    assert np.isfinite(volume.shares(places, simplexes)).all()
    assert volume.gradient(places, simplexes, 3).tolist() == [0] * 4


def test_the_volumes_gradient_is_a_finite_difference_in_every_weight():
    three = states(Small, 3)
    network = Small()
    vertices = Vertices(network, three, [2], set())
    for weight in vertices.trained():
        weight.grad = torch.zeros_like(weight)
    names = [name for name, _ in network.named_parameters()]
    vertices.add_to_gradient(2, volume.gradient(vertices.coordinates(), [[0, 1, 2]], 2))
    for name, weight in vertices.named_trained(2).items():
        flat = weight.detach().view(-1)
        for i in range(0, len(flat), 3):
            kept = flat[i].item()
            flat[i] = kept + 1e-5
            above = volume.log_volume(coordinates([*three[:2], vertices.state(2)], names))
            flat[i] = kept - 1e-5
            below = volume.log_volume(coordinates([*three[:2], vertices.state(2)], names))
            flat[i] = kept
            assert weight.grad.view(-1)[i].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-9), name
