"""What a store does, whether it is a folder or a bucket."""

import subprocess

import numpy as np
import pytest

from models_store import signing, upkeep
from models_store.decisions.calibrating import Labelled, calibrate
from models_store.errors import EnsembleNotFoundError, InvalidNameError, MemberError, StoreError
from models_store.graphs.runtime import EnsembleSession
from models_store.manifest import Draft, InputSpec, Manifest, Member, Origin
from models_store.records.rollout import RollOut
from models_store.store import Store
from tests.onnx_members import SHAPE, publish

IMAGES = np.random.default_rng(0).random((3, *SHAPE), np.float32)


def test_a_store_without_versions_is_empty(either):
    assert either.names() == either.versions("a") == either.activation_order() == []
    with pytest.raises(EnsembleNotFoundError, match="Nothing is published here"):
        either.load("a")
    with pytest.raises(EnsembleNotFoundError, match=r"has no version 3 .*published: none"):
        either.load("a", 3)


def test_what_is_published_is_read_back_whole_and_verifies(either):
    made = publish(either, "a")
    found = either.load("a")
    assert found.manifest == made.manifest
    assert found.digest == made.digest == either.digest("a", 1)
    either.verify(found)
    assert found.folder.name == "1"
    assert np.isfinite(EnsembleSession(found.folder, found.manifest, "cpu").logits(IMAGES)).all()
    assert Manifest.parse((found.folder / "manifest.json").read_bytes(), "it") == made.manifest


def test_numbers_ascend_and_are_not_given_again(either):
    assert [publish(either, "a").manifest.version for _ in range(3)] == [1, 2, 3]
    publish(either, "b", activate=False)
    assert either.names() == ["a", "b"]
    assert either.versions("a") == [1, 2, 3]
    assert either.active("a") == 3
    either.activate("a", 1)
    assert either.remove("a", 3)
    assert either.versions("a") == [1, 2]
    assert publish(either, "a").manifest.version == 4
    assert not either.remove("a", 4)  # it is active


def test_activations_are_read_in_their_order_and_told_apart(either):
    for name in ("a", "b", "c"):
        publish(either, name)
    assert either.activation_order() == ["a", "b", "c"]
    before = either.activation_token("a")
    either.activate("a", 1)
    assert either.activation_token("a") != before
    assert either.activation_order() == ["b", "c", "a"]
    either.deactivate("c")
    assert either.activation_order() == ["b", "a"]
    assert either.activation_token("c") is None
    with pytest.raises(EnsembleNotFoundError):
        either.active("c")
    with pytest.raises(EnsembleNotFoundError):
        either.activate("a", 9)


def test_a_canary_begins_ends_and_is_ended_by_an_activation(either):
    publish(either, "a")
    publish(either, "a", seeds=(5, 6), activate=False)
    either.begin_roll_out("a", RollOut(version=2, share=0.1))
    assert either.roll_out("a").version == either.canary("a") == 2
    assert not either.remove("a", 2)
    assert either.end_roll_out("a", why="slow")
    assert either.roll_out("a").ended == "slow"
    assert not either.end_roll_out("a", why="again")
    either.begin_roll_out("a", RollOut(version=2, shadow=1.0))
    either.activate("a", 2)
    assert either.roll_out("a") is None
    with pytest.raises(StoreError, match="active already"):
        either.begin_roll_out("a", RollOut(version=2, share=0.1))


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a" * 65, "a b"])
def test_names_that_are_not_names_are_refused(either, name):
    for act in (either.versions, either.active, either.load, either.check_writable, lambda name: publish(either, name)):
        with pytest.raises(InvalidNameError):
            act(name)


def test_nothing_is_published_if_a_member_is_refused_or_the_publisher_fails(either, tmp_path):
    with pytest.raises(MemberError), either.staging("a") as staged:
        (staged / "members").mkdir()
        (staged / "members/000.onnx").write_bytes(b"garbage")
        one = Member(file="members/000.onnx", origin=Origin(), weight=1.0)
        either.publish(
            "a", staged, Draft(method="import", input=InputSpec(shape=SHAPE), classes=["x", "y", "z"], members=[one])
        )
    with pytest.raises(KeyError), either.staging("a") as staged:
        raise KeyError
    assert either.names() == []
    assert publish(either, "a").manifest.version == 1


def test_it_can_be_checked_before_a_training(either):
    either.check_writable("a")
    assert either.names() == []


def test_a_version_is_recalibrated(either):
    made = publish(either, "a")
    rng = np.random.default_rng(0)
    images, labels = rng.random((400, *SHAPE), np.float32), rng.integers(0, 3, 400)
    again = calibrate(either, made, Labelled(images, labels, "these"))
    assert again.manifest.calibration.images == 200
    either.verify(either.load("a", 2))


def test_a_run_is_found_by_its_identity(either):
    publish(either, "a")
    assert either.find_run("a", "unknown") is None


def test_old_versions_are_collected_but_what_serves_is_kept(either):
    for _ in range(4):
        publish(either, "a")
    either.activate("a", 1)
    upkeep.collect_garbage(either, keep=1)
    assert either.versions("a") == [1, 4]


def test_versions_are_copied_between_a_folder_and_a_bucket_and_back(address, tmp_path):
    folder, bucket, back = Store(tmp_path / "one"), Store(address), Store(tmp_path / "two")
    made = [publish(folder, "a"), publish(folder, "a", seeds=(7, 8, 9)), publish(folder, "b")]
    for source, target in ((folder, bucket), (bucket, back)):
        for name in source.names():
            for number in source.versions(name):
                target.adopt(source.load(name, number))
        assert {name: target.versions(name) for name in target.names()} == {"a": [1, 2], "b": [1]}
        with pytest.raises(StoreError, match="exists already"):
            target.adopt(source.load("a", 1))
    for version in made:
        found = back.load(version.manifest.name, version.manifest.version)
        assert found.digest == version.digest
        back.verify(found)
    assert publish(bucket, "a").manifest.version == 3


def test_a_signature_goes_with_a_version(either, tmp_path):
    pytest.importorskip("model_signing.signing", reason="the signing extra is not installed")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    signing.sign(either, publish(either, "a"), private)
    again = Store(either.root)
    signing.check(again, again.load("a"), [public])
