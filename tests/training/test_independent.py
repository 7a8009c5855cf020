import torch
from safetensors.torch import load_file

from models_store.store import Store
from tests.training.conftest import SMALL
from training import independent
from training.independent import Config
from training.runs import Run


def test_networks_differ_in_their_initial_weights_and_each_gets_the_whole_budget():
    config = Config(epochs=3, runs=2)
    with Run.open("plan", {}, {}, fresh=True) as run:
        legs = independent.plan(config, run, 10).legs
    assert [leg.start.stem for leg in legs] == ["fresh-0", "fresh-1"]
    assert [(leg.iterations, leg.collect) for leg in legs] == [(30, (30,))] * 2


def test_more_networks_leave_the_first_ones_as_they_are():
    """One training run can therefore serve every budget."""
    one = independent.run(Config(name="one", epochs=2, runs=1, **SMALL))
    two = independent.run(Config(name="two", epochs=2, runs=2, **SMALL))
    Store().verify(two)
    a, b = (load_file(v.folder / "weights/000.safetensors") for v in (one, two))
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())
    other = load_file(two.folder / "weights/001.safetensors")
    assert not torch.allclose(a["head.weight"], other["head.weight"], atol=1e-2)
    assert two.manifest.provenance.epochs_spent == 4
