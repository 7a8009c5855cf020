import pytest
import torch

from models_store.manifest import InputSpec
from training import networks
from training.errors import NetworkError

TEXTS = InputSpec(kind="tokens", shape=(9,), vocabulary=50)


def test_networks_of_timm_take_any_number_of_channels():
    pytest.importorskip("timm", reason="not installed")
    for channels in (1, 3):
        network = networks.build("timm:resnet10t", 5, (channels, 64, 64), {})
        assert network(torch.rand(2, channels, 64, 64)).shape == (2, 5)
    with pytest.raises(NetworkError, match="timm has no classifier 'resnet10'; similar ones are"):
        networks.build("timm:resnet10", 5, (3, 64, 64), {})


def bert(folder):
    transformers = pytest.importorskip("transformers", reason="not installed")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    network = transformers.BertForSequenceClassification(config)
    network.save_pretrained(folder)
    return network


def test_a_classifier_of_transformers_begins_with_its_weights_and_masks_the_padding(tmp_path):
    source = bert(tmp_path)
    network = networks.build(f"transformers:{tmp_path}", 3, TEXTS, {})
    ids = torch.tensor([[4, 8, 15, 0, 0]])
    with torch.no_grad():
        expected = source.eval()(ids[:, :3]).logits
        assert torch.allclose(network.eval()(ids), expected, atol=1e-5)
    other = networks.build(f"transformers:{tmp_path}", 7, TEXTS, {})  # a head of another size begins anew
    assert other(ids).shape == (1, 7)


def test_a_folder_without_a_classifier_is_told(tmp_path):
    pytest.importorskip("transformers", reason="not installed")
    with pytest.raises(NetworkError, match=r"local folder with config\.json"):
        networks.build(f"transformers:{tmp_path}", 3, TEXTS, {})


def test_a_library_that_is_missing_is_told(monkeypatch):
    import sys

    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(NetworkError, match=f"pip install {name}"):
            networks.build(f"{name}:something", 3, (3, 8, 8), {})
