import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models_store.graphs.runtime import MemberSession
from models_store.manifest import InputSpec
from tests.training.other_networks import looping
from training import networks
from training.errors import ExportError
from training.members.export import Exporter, Normalised, check_parity, open_exported, to_onnx, torch_logits

IMAGES = InputSpec(shape=(1, 8, 8))

CPU = torch.device("cpu")


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


class Attention(nn.Module):
    """A small transformer over rows, with a class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        rows = self.embed(images.squeeze(1))
        rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], dim=1)
        return self.head(self.encoder(rows)[:, 0])


class Odd(nn.Module):
    """GroupNorm, PReLU, a tied weight, and a buffer that is not a statistic."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm, self.act, self.head = nn.GroupNorm(4, 64), nn.PReLU(), nn.Linear(64, 5)
        self.register_buffer("scale", torch.tensor(1.7))

    def forward(self, images):
        return self.head(self.act(self.norm(self.second(self.first(images.flatten(1))))) * self.scale)


NETWORKS = {
    "mlp": lambda: networks.build("mlp", 5, (1, 8, 8), {}),
    "preresnet8": lambda: networks.build("preresnet8", 5, (1, 8, 8), {}),
    "vgg16-bn": lambda: networks.build("vgg16-bn", 5, (1, 8, 8), {"width": 0.125}),
    "resnet18": lambda: networks.build("torchvision:resnet18", 5, (1, 8, 8), {}),
    "lstm": Rows,
    "transformer": Attention,
    "odd": Odd,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_module_gives_the_same_answers_from_its_file(name):
    torch.manual_seed(0)
    served = Normalised(NETWORKS[name](), (0.3,), (0.4,)).eval()
    session = open_exported(to_onnx(served, IMAGES))
    images = np.random.default_rng(0).random((33, 1, 8, 8), dtype=np.float32)
    check_parity(served, session, images, CPU)
    with torch.no_grad():
        expected = served.network((torch.from_numpy(images) - 0.3) / 0.4).numpy()
    assert session.logits(images) == pytest.approx(expected, abs=1e-4)
    assert session.logits(images[:1]).shape == (1, 5)


def test_the_file_says_nothing_of_the_machine_that_made_it():
    model = onnx.load_from_string(to_onnx(Normalised(NETWORKS["mlp"](), (0.3,), (0.4,)), IMAGES))
    assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
    assert b"/training/" not in model.SerializeToString()


def test_a_member_that_differs_from_torch_is_refused():
    network = NETWORKS["mlp"]()
    session = open_exported(to_onnx(Normalised(network, (0.3,), (0.4,)), IMAGES))
    images = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        network[-1].bias[0] += 1e-3
    with pytest.raises(ExportError, match="differs from torch"):
        check_parity(Normalised(network, (0.3,), (0.4,)), session, images, CPU)


class Unsteady(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        return self.head(nn.functional.dropout(images.flatten(1), 0.5, training=True))


def test_a_network_that_is_random_in_eval_mode_is_refused():
    served = Normalised(Unsteady(), (0.3,), (0.4,))
    images = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
    with pytest.raises(ExportError):
        check_parity(served, open_exported(to_onnx(served, IMAGES)), images, CPU)


class Branching(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.sum().item() > 0 else -images.flatten(1)


def test_a_network_that_cannot_be_traced_is_told():
    with pytest.raises(ExportError, match="cannot export"):
        to_onnx(Normalised(Branching(), (0.3,), (0.4,)), IMAGES)


def test_an_operator_that_onnx_lacks_is_named_without_terminal_codes(capfd):
    network = nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(9, 5))
    with pytest.raises(ExportError, match=r"no operator for aten\.adaptive_max_pool2d") as refused:
        to_onnx(Normalised(network, (0.3,), (0.4,)), IMAGES)
    assert "\x1b" not in str(refused.value)
    assert "step 3/3" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_a_loop_over_the_batch_is_named_and_the_exporter_is_quiet(capfd):
    with pytest.raises(ExportError, match="loop over the batch"):
        to_onnx(Normalised(looping(5, (1, 8, 8)), (0.3,), (0.4,)), IMAGES)
    assert capfd.readouterr() == ("", "")


class Fixed:
    """A session that always returns the given logits."""

    def __init__(self, logits):
        self._logits = logits

    def logits(self, images):
        return self._logits


@pytest.mark.parametrize(
    ("scale", "off", "told"),
    [
        (1, 0.5e-5, None),
        (1, 8e-5, "differs from torch"),
        (50, 6e-5, None),  # rounding of saturated logits: 1e-6 of their size
        (50, 1e-3, "differs from torch"),
        (1e5, 0, None),
        (1e5, 5, "training diverged"),
        (np.inf, 0, "training diverged"),
    ],
)
def test_parity_is_measured_by_the_size_of_the_logits_and_divergence_is_named(scale, off, told):
    # Two equal logits, because probabilities of ½ are the most sensitive.
    logits = np.array([[scale, scale, -scale]], np.float32)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        network[1].weight.zero_()  # pyright: ignore[reportCallIssue]
        network[1].bias.copy_(torch.from_numpy(logits[0]))  # pyright: ignore[reportCallIssue]
    session = Fixed(logits + np.array([off, 0, 0], np.float32))
    images = np.zeros((1, 1, 8, 8), np.float32)
    if told is None:
        check_parity(Normalised(network, (0.3,), (0.4,)), session, images, CPU)
    else:
        with pytest.raises(ExportError, match=told):
            check_parity(Normalised(network, (0.3,), (0.4,)), session, images, CPU)


class Amplified(Fixed):
    """A session that amplifies the last bit of a pixel by this factor."""

    def __init__(self, logits, factor):
        super().__init__(logits)
        self._factor = factor

    def logits(self, images):
        first = images.reshape(len(images), -1)[:, :1]
        return self._logits + np.float32(self._factor) * first * np.array([1, 0, 0], np.float32)


@pytest.mark.parametrize(("off", "told"), [(1e-4, None), (2e-2, "differs from torch")])
def test_parity_allows_what_the_network_makes_of_a_pixels_last_bit_and_not_more(off, told):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        network[1].weight.zero_()  # pyright: ignore[reportCallIssue]
        network[1].bias.zero_()  # pyright: ignore[reportCallIssue]
    session = Amplified(np.array([[off, 0, 0]], np.float32), 300)
    images = np.zeros((1, 1, 8, 8), np.float32)
    served = Normalised(network, (0.3,), (0.4,))
    if told is None:
        check_parity(served, session, images, CPU)
    else:
        with pytest.raises(ExportError, match=told):
            check_parity(served, session, images, CPU)


@pytest.mark.parametrize("name", ["preresnet8", "odd"])
def test_which_weights_were_traced_leaves_no_trace_in_the_file(name):
    images = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
    torch.manual_seed(0)
    other, served = (Normalised(NETWORKS[name](), (0.3,), (0.4,)).eval() for _ in range(2))
    traced = Exporter(IMAGES)
    traced.trace(other)
    assert traced.export(served, images, CPU)[0] == Exporter(IMAGES).export(served, images, CPU)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_one_exporter_serves_members_of_different_weights(name):
    images = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
    exporter = Exporter(IMAGES)
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        served = Normalised(NETWORKS[name](), (0.3,), (0.4,)).eval()
        model, session = exporter.export(served, images, CPU)
        assert session.logits(images) == pytest.approx(torch_logits(served, images, CPU), abs=1e-4)
        assert MemberSession(model).logits(images) == pytest.approx(session.logits(images), abs=1e-6)


def test_a_graph_that_is_not_the_members_is_traced_anew():
    images = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
    exporter = Exporter(IMAGES)
    exporter.export(Normalised(NETWORKS["mlp"](), (0.3,), (0.4,)), images, CPU)
    other = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 5)
    )
    served = Normalised(nn.Sequential(*other), (0.3,), (0.4,))
    _, session = exporter.export(served, images, CPU)
    assert session.logits(images) == pytest.approx(torch_logits(served, images, CPU), abs=1e-4)


def test_exporting_leaves_the_network_as_it_was():
    network = NETWORKS["preresnet8"]().to(memory_format=torch.channels_last).train()
    served = Normalised(network, (0.3,), (0.4,))
    served.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    to_onnx(served, IMAGES)
    assert served.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert isinstance(MemberSession(to_onnx(served, IMAGES)), MemberSession)
    assert torch_logits(served, np.zeros((1, 1, 8, 8), np.float32), CPU).shape == (1, 5)
