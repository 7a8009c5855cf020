"""Members in int8 and bfloat16: what is published, what it costs, and what is refused."""

import numpy as np
import onnx
import pytest
import torch

from models_store.graphs.runtime import EnsembleSession, MemberSession
from models_store.manifest import Manifest, Scores
from models_store.reports.card import card
from models_store.store import Store
from models_store.uncertainty import combine, softmax
from tests.training.test_inputs import SMALL
from training import config as config_module
from training import data, fge
from training.errors import ConfigError, ExportError
from training.members import activation, quantising
from training.members.metrics import score
from training.members.quantising import Quantiser

DIGITS = {"dataset": "digits", "network": "preresnet8", "network_options": ("width=0.5",), "epochs": 6, "limit": 500, "batch_size": 32}  # fmt: skip


def run(**options):
    return fge.run(fge.Config(name="q", members=3, **options))


def contents(version):
    return [(version.folder / member.file).read_bytes() for member in version.manifest.members]


def test_one_training_is_published_in_each_format_and_each_says_what_it_lost(capsys):
    versions = {kind: run(**DIGITS, quantize=kind, quantize_loss=0.5) for kind in ("none", "int8", "bf16")}
    log = capsys.readouterr()
    assert (log.out + log.err).count("published q@") == 3
    assert len({version.manifest.provenance.run for version in versions.values()}) == 1
    again = run(**DIGITS, quantize="int8")
    assert again.manifest == versions["int8"].manifest  # it is finished
    size = {kind: sum(map(len, contents(version))) for kind, version in versions.items()}
    assert size["int8"] < 0.5 * size["none"]
    assert size["bf16"] < 0.7 * size["none"]
    images, labels = data.as_arrays(data.load(data.options.DataOptions("digits", limit=500)).validation)
    exact = versions["none"].manifest
    assert exact.quantization is None
    assert '"quantization"' not in exact.dump()
    for kind in ("int8", "bf16"):
        found = versions[kind].manifest
        assert (found.schema_version, found.quantization.format) == (4, kind)
        assert found.quantization.float32.accuracy == exact.validation.accuracy
        assert found.quantization.float32.nll == pytest.approx(exact.validation.nll, abs=1e-6)
        # The scores are those of the files that are served.
        logits = np.stack([MemberSession(one).logits(images) for one in contents(versions[kind])])
        weights = np.array([member.weight for member in found.members])
        own = score(combine(softmax(logits, found.temperature), weights).mean_probs, labels)
        assert found.validation.nll == pytest.approx(own.nll, abs=1e-6)
        assert kind in card(versions[kind].manifest)
        assert found.calibration.novelty.features == exact.calibration.novelty.features
        Store().verify(versions[kind])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_networks_of_every_kind_answer_nearly_as_before_and_alike_alone_and_together(name, kind):
    options = {"batch_size": 16, "dataset": name, **SMALL[name]}
    exact, less = (run(**options, quantize=one, quantize_loss=0.3) for one in ("none", kind))
    x, _ = data.as_arrays(data.load(config_module.data_options(exact.manifest.provenance.config)).test, 200)
    session, before = (EnsembleSession(one.folder, one.manifest, "cpu") for one in (less, exact))
    together = session.logits(x)
    for number, content in enumerate(contents(less)):
        assert together[number] == pytest.approx(MemberSession(content).logits(x), abs=1e-4)
    new, old = (one.combine(one.member_probs(x)).mean_probs for one in (session, before))
    assert (new.argmax(1) == old.argmax(1)).mean() > 0.9
    assert not np.array_equal(new, old)


def test_bfloat16_is_rounded_as_torch_rounds():
    values = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(quantising._rounded(values.numpy()), expected)


@pytest.mark.parametrize(("accuracy", "nll", "refused"), [(0.90, 0.30, False), (0.88, 0.30, True), (0.91, 0.33, True)])
def test_a_loss_beyond_the_limit_is_refused_with_both_scores(accuracy, nll, refused):
    before, after = (Scores(accuracy=a, nll=n, brier=0.1, ece=0.0) for a, n in ((0.905, 0.29), (accuracy, nll)))
    if not refused:
        quantising.check_loss("int8", before, after, 0.02)
        return
    with pytest.raises(ExportError, match=rf"{accuracy:.4f}.*{nll:.4f}.*0.9050.*0.2900.*--quantize-loss"):
        quantising.check_loss("int8", before, after, 0.02)


def test_what_is_refused_is_not_published_and_the_float32_members_are_without_training(monkeypatch, capsys):
    monkeypatch.setattr(quantising, "_bf16", lambda model: _shuffled(model))
    with pytest.raises(ExportError, match="the same command without --quantize publishes the float32 members"):
        run(**DIGITS, quantize="bf16")
    assert Store().versions("q") == []
    capsys.readouterr()
    assert run(**DIGITS).manifest.version == 1
    assert "epoch" not in "".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch"))


def test_a_member_that_quantisation_spoils_is_not_left_out_but_refused(monkeypatch):
    calls = []
    exact = quantising._bf16

    def spoil_the_first(model):
        calls.append(model)
        return _shuffled(model) if len(calls) == 1 else exact(model)

    monkeypatch.setattr(quantising, "_bf16", spoil_the_first)
    with pytest.raises(ExportError, match="--quantize-loss"):
        run(**DIGITS, quantize="bf16")
    assert Store().versions("q") == []


class Masked(torch.nn.Module):
    """Adds the lowest float32 where a mask is set, as attention does."""

    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(64, classes)
        self.register_buffer("lowest", torch.tensor([torch.finfo(torch.float32).min]))

    def forward(self, images):
        return self.linear(images.flatten(1)) + 0.0 * (1.0 - torch.ones_like(images.flatten(1)[:, :1])) * self.lowest


def masked(classes, shape):
    return Masked(classes)


def test_the_lowest_number_stays_finite_in_bfloat16():
    version = run(
        **{**DIGITS, "network": f"{__name__}:masked", "network_options": ()}, quantize="bf16", quantize_loss=0.5
    )
    images, _ = data.as_arrays(data.load(data.options.DataOptions("digits", limit=500)).validation)
    assert np.isfinite(MemberSession(contents(version)[0]).logits(images)).all()


def test_outputs_that_are_not_finite_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(quantising, "_rounded", lambda values: np.full(values.shape, 0x7FC0, np.uint16))
    with pytest.raises(ExportError, match=r"outputs are not finite.*without --quantize"):
        run(**DIGITS, quantize="bf16")


def test_each_format_has_its_own_decision_about_activation(caplog):
    run(**DIGITS)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(activation, "refusal", lambda *given, **named: "it is refused here.")
        run(**DIGITS, quantize="bf16", quantize_loss=0.5)
    assert Store().active("q") == 1
    caplog.clear()
    run(**DIGITS)
    assert "NOT ACTIVATED" not in caplog.text
    run(**DIGITS, quantize="bf16")
    assert "NOT ACTIVATED: it is refused here." in caplog.text


def test_a_finished_version_beyond_the_limit_is_said(caplog):
    run(**DIGITS, quantize="int8", quantize_loss=0.5)
    caplog.clear()
    run(**DIGITS, quantize="int8", quantize_loss=0.0)
    found = caplog.text
    scores = Store().load("q").manifest
    worse = (
        scores.quantization.float32.nll < scores.validation.nll
        or scores.quantization.float32.accuracy > scores.validation.accuracy
    )
    assert ("published with a larger --quantize-loss" in found) == worse


def test_a_model_that_cannot_be_quantised_is_refused_with_the_reason():
    with pytest.raises(ExportError, match=r"cannot be quantised to int8: .*without --quantize"):
        Quantiser("int8", np.zeros((1, 1, 8, 8), np.float32))(b"not a model")


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="--quantize-loss must lie in"):
        fge.Config(quantize="int8", quantize_loss=2.0)


def test_earlier_schema_versions_have_no_quantised_members():
    version = run(**DIGITS, quantize="bf16", quantize_loss=0.5)
    text = version.manifest.model_copy(update={"schema_version": 2, "digest": None}).dump()
    with pytest.raises(Exception, match="quantised members need schema version 4"):
        Manifest.parse(text, "it")


def _shuffled(model):
    found = onnx.load_from_string(model)
    for tensor in found.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            values = np.random.default_rng(0).permutation(values.reshape(-1)).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return found.SerializeToString()
