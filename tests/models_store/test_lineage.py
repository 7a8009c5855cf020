import dataclasses
import itertools
import os
import pickle

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save_file

from models_store import lineage
from models_store.errors import CorruptionError, LineageError
from models_store.lineage import families, marks, related
from models_store.manifest import Geometry
from tests.onnx_members import publish


@pytest.fixture
def with_weights(store):
    """Publish an ensemble whose members are these weight sets."""

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
        return dataclasses.replace(version, manifest=found)

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
        assert related(marks(imported), marks(trained))
    assert not related(marks(imported), marks(with_weights("others", network(2), network(3))))


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
    assert len(found[0]) == 5  # the file; the matrix and its transpose, each with a digest and a sketch
    onnx.save(model, file)
    with pytest.raises(LineageError, match="imported@1"):
        marks(imported)


def test_families_are_joined_through_others():
    found = families({"a": frozenset({b"1"}), "b": frozenset({b"2"}), "c": frozenset({b"1", b"2"}), "d": frozenset()})
    assert sorted(map(sorted, found)) == [["a", "b", "c"], ["d"]]


SHAPES = {
    "conv": (16, 3, 3, 3),
    "deep": (32, 16, 3, 3),
    "head": (64, 10),
    "bias": (64,),
    "scale": (128,),
    "variance": (128,),
}


def trained(seed, **others):
    """Tensors like those of a trained network: scales near 1, positive variances, a table that all networks share."""
    rng = np.random.default_rng(seed)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    state["scale"] = (1 + 0.01 * state["scale"]).astype(np.float32)
    state["variance"] = np.exp(state["variance"])
    table = np.sin(np.arange(512, dtype=np.float32) / 7).reshape(8, 64)
    return {**state, "positions": table, **others}


def ulp(tensor):
    return np.nextafter(tensor, np.float32(np.inf))


ROUNDINGS = {
    "float16": lambda tensor: tensor.astype(np.float16).astype(np.float32),
    "bfloat16": lambda tensor: tensor.astype(ml_dtypes.bfloat16).astype(np.float32),
    "one ulp": ulp,
    "scaled": lambda tensor: tensor * np.float32(1.7),
    "kept in float16": lambda tensor: tensor.astype(np.float16),
    "kept in bfloat16": lambda tensor: tensor.astype(ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("change", ROUNDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_rounded_copy_is_related_and_others_are_not(with_weights, change, seed):
    seeds = [10 * seed + offset for offset in range(4)]
    one = marks(with_weights("one", trained(seeds[0]), trained(seeds[1])))
    rounded = {name: ROUNDINGS[change](tensor) for name, tensor in trained(seeds[1]).items()}
    kept = {name: np.ascontiguousarray(tensor) for name, tensor in rounded.items()}
    if change == "kept in bfloat16":  # numpy's safetensors cannot write it
        kept = {name: tensor.astype(np.float32) for name, tensor in kept.items()}
    copy = marks(with_weights("copy", kept, trained(seeds[2])))
    assert not one & copy - marks(with_weights("tables", trained(seeds[3])))  # no trained tensor is bit-identical
    assert related(one, copy)
    assert related(copy, one)
    assert not related(one, marks(with_weights("other", trained(seeds[2]), trained(seeds[3]))))


@pytest.mark.parametrize("change", ROUNDINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_rounded_copy_that_was_imported_as_onnx_is_related(store, with_weights, change, turned):
    one = marks(with_weights("one", trained(0), trained(1)))
    imported = publish(store, "imported", seeds=(50,))
    file = imported.folder / imported.manifest.members[0].file
    model = onnx.load(file)
    for seed, expected in ((1, True), (2, False)):
        held = ROUNDINGS[change](trained(seed)["head"])
        del model.graph.initializer[:]
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(held.T if turned else held), "w"))
        onnx.save(model, file)
        assert related(one, marks(imported)) == expected


def test_two_thousand_networks_that_were_trained_apart_are_not_related(with_weights):
    """No two of their tensors are near by chance, even if one channel dominates the others."""
    rng = np.random.default_rng(0)
    states = [{"w": rng.normal(size=64).astype(np.float32)} for _ in range(1000)]
    for _ in range(1000):
        spiked = np.abs(rng.normal(size=64)).astype(np.float32)
        spiked[rng.integers(4)] = 1e4
        states.append({"variance": spiked})
    found = {str(i): lineage._of_tensors(state.values()) for i, state in enumerate(states)}
    assert len(families(found)) == len(states)


def test_a_backbone_that_was_hardly_moved_marks_nothing_where_all_networks_have_it(with_weights):
    """Like a frozen backbone, which unrelated networks may have from the same source."""
    given = trained(0)["deep"]

    def tuned(seed):
        noise = np.random.default_rng(seed).normal(size=given.shape).astype(np.float32)
        return trained(seed, deep=given + np.float32(1e-3) * noise)

    one, two = (marks(with_weights(name, *map(tuned, seeds))) for name, seeds in (("one", (1, 2)), ("two", (3, 4))))
    assert not related(one, two)
    single = marks(with_weights("single", tuned(5)))
    assert related(single, marks(with_weights("copy", {"deep": given})))


def test_copies_of_one_network_in_one_ensemble_are_known_again(with_weights):
    both = marks(with_weights("both", trained(0), {name: ulp(tensor) for name, tensor in trained(0).items()}))
    assert related(both, marks(with_weights("copy", trained(0))))


def test_marks_can_be_joined_and_sent_to_another_process(with_weights):
    one, two = (marks(with_weights(name, trained(seed))) for name, seed in (("one", 0), ("two", 1)))
    joined = pickle.loads(pickle.dumps(frozenset().union(one, two)))
    assert related(joined, two)
    assert all(isinstance(mark, bytes) for mark in joined)


@pytest.mark.parametrize("shape", [(1025,), (1024, 1025), (3, 2**19)])
def test_a_tensor_of_any_size_is_known_again(shape):
    one = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    two = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    copy = one.astype(np.float16)
    assert related(lineage._of_tensors([one]), lineage._of_tensors([copy]))
    assert not related(lineage._of_tensors([one]), lineage._of_tensors([two]))


def test_what_is_not_finite_or_no_file_is_not_compared(with_weights):
    mask = np.where(np.tri(16, dtype=bool), 0, -np.inf).astype(np.float32)
    assert not [mark for mark in lineage._of_tensors([mask]) if lineage._is_sketch(mark)]
    version = with_weights("one", trained(0))
    file = version.folder / "weights/000.safetensors"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptionError, match="FIFO"):
        marks(version)
