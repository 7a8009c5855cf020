import itertools

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save_file

from models_store.errors import LineageError
from models_store.lineage import families, marks
from models_store.manifest import Geometry
from tests.onnx_members import publish


@pytest.fixture
def with_weights(store):
    """An ensemble whose members are these weight sets."""

    seeds = itertools.count()

    def make(name, *states, vertices=()):
        version = publish(store, name, seeds=[next(seeds) for _ in states])
        members = []
        for index, (member, state) in enumerate(zip(version.manifest.members, states, strict=True)):
            file = f"weights/{index:03d}.safetensors"
            (version.folder / "weights").mkdir(exist_ok=True)
            save_file(state, version.folder / file)
            members.append(member.model_copy(update={"weights": file}))
        files = [f"vertices/{index:03d}.safetensors" for index in range(len(vertices))]
        for file, state in zip(files, vertices, strict=True):
            (version.folder / "vertices").mkdir(exist_ok=True)
            save_file(state, version.folder / file)
        geometry = Geometry(shape="bezier", vertices=files, components=[[0]]) if files else None
        found = version.manifest.model_copy(update={"members": members, "geometry": geometry})
        return type(version)(version.folder, found)

    return make


def network(seed, **others):
    rng = np.random.default_rng(seed)
    trained = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    fixed = {"positions": np.arange(6, dtype=np.float32), "zero": np.zeros(4, np.float32), "count": np.arange(3)}
    return {**trained, **fixed, **others}


def test_a_member_that_is_a_vertex_elsewhere_is_shared(with_weights):
    ends = marks(with_weights("ends", network(0), network(1)))
    curve = marks(with_weights("curve", network(5), network(6), vertices=(network(0), network(7), network(1))))
    assert ends & curve


def test_one_tensor_in_common_is_enough_because_statistics_may_have_been_measured_again(with_weights):
    one = marks(with_weights("one", network(0), network(1)))
    again = network(0, b=np.random.default_rng(9).normal(size=4).astype(np.float32))
    assert one & marks(with_weights("two", again, network(2)))


def test_what_training_did_not_decide_is_not_shared(with_weights):
    one = marks(with_weights("one", network(0), network(1)))
    assert not one & marks(with_weights("two", network(2), network(3)))


def test_imported_members_are_known_by_their_files(store):
    one, two, other = publish(store, "a", (0, 1)), publish(store, "b", (1, 2)), publish(store, "c", (3,))
    assert marks(one) & marks(two)
    assert not marks(one) & marks(other)


def test_a_network_that_was_imported_as_onnx_is_known_by_its_weights(store, with_weights, tmp_path):
    weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    trained = with_weights("trained", network(0, w=weights), network(1))
    imported = publish(store, "imported", seeds=(50,))
    file = imported.folder / imported.manifest.members[0].file
    model = onnx.load(file)
    for turned in (weights, np.ascontiguousarray(weights.T)):
        del model.graph.initializer[:]
        mean = np.array([0.485, 0.456, 0.406], np.float32)
        model.graph.initializer.extend([numpy_helper.from_array(turned, "w"), numpy_helper.from_array(mean, "mean")])
        onnx.save(model, file)
        assert len(marks(imported) & marks(trained)) == 1
    assert not marks(imported) & marks(with_weights("others", network(2), network(3)))


def test_weights_in_constant_nodes_and_in_subgraphs_are_seen_and_a_network_without_any_is_no_ones_for_sure(store):
    weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    imported = publish(store, "imported", seeds=(50,))
    file = imported.folder / imported.manifest.members[0].file
    model = onnx.load(file)
    del model.graph.initializer[:]
    bare = model.SerializeToString()
    found = []
    constant = onnx.helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights))
    inner = onnx.helper.make_graph([constant], "inner", [], [])
    for holder in (constant, onnx.helper.make_node("If", ["c"], [], then_branch=inner, else_branch=inner)):
        model.graph.node.append(holder)
        onnx.save(model, file)
        found.append(marks(imported))
        model = onnx.load_from_string(bare)
    assert found[0] == found[1]
    assert len(found[0]) == 3  # the file; the matrix both ways round
    onnx.save(model, file)
    with pytest.raises(LineageError, match="imported@1"):
        marks(imported)


def test_families_are_joined_through_others():
    found = families({"a": frozenset({b"1"}), "b": frozenset({b"2"}), "c": frozenset({b"1", b"2"}), "d": frozenset()})
    assert sorted(map(sorted, found)) == [["a", "b", "c"], ["d"]]
