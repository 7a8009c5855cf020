import pytest

from training.errors import ConfigError
from training.fge import Config


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"momentum": 1.0}, {"label_smoothing": -0.1}, {"bn_images": 0},
        {"nesterov": True, "momentum": 0.0}, {"loss": "a:b", "label_smoothing": 0.1}, {"alpha_1": 1e-4}, {"alpha_2": 0},
        {"pretrain": 1.0}, {"pretrain": 0.0}, {"epochs": 1}, {"members": 0}, {"cycle": 0.0}, {"starts": (40,)},
        {"starts": (1,), "init": ("x.pt",)},
    ],
)  # fmt: skip
def test_options_that_cannot_be_carried_out_are_refused(options):
    with pytest.raises(ConfigError):
        Config(**options)


def test_what_decides_the_result_is_json_and_leaves_the_incidental_out():
    import json

    from training.config import data_options

    config = Config(init=("a.pt",), mean=(0.5,), std=(0.5,), fresh=True, log="csv")
    record = json.loads(json.dumps(config.deciding()))
    assert not {"fresh", "log", "activate"} & set(record)
    assert record["init"] == ["a.pt"]
    assert record["alpha_1"] == 0.05
    assert data_options(record) == config.data_options()


def test_network_options_are_python_literals_or_text():
    config = Config(network_options=("width=0.5", "bottleneck=True", "kind=plain"))
    assert config.network_kwargs() == {"width": 0.5, "bottleneck": True, "kind": "plain"}
    for wrong in ("width", "=1", "a b=1"):
        with pytest.raises(ConfigError, match="key=value"):
            Config(network_options=(wrong,)).network_kwargs()


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("digits", "digits-fge"), ("imagefolder:/data/pets", "pets-fge"), ("my.data:make", "make-fge")],
)
def test_the_default_name_is_one_the_store_takes(dataset, name):
    assert Config(dataset=dataset).published_name == name
