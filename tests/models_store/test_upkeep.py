import hashlib
import shutil
import subprocess
import sys

import pytest

from models_store import upkeep
from models_store.errors import EnsembleNotFoundError
from models_store.manifest import Draft, Provenance
from models_store.store import Store
from tests.onnx_members import publish


def tree(store):
    return {
        str(file.relative_to(store.root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in store.root.rglob("*") if file.is_file() and ".numbers" not in file.parts and file.name != ".activated"
    }  # fmt: skip


def based(store, published, **config):
    """Publish a version that records these options."""
    first = publish(store, published, (7,))
    with store.staging(published) as staged:
        shutil.copytree(first.folder / "members", staged / "members")
        record = first.manifest
        draft = Draft(
            method="fge",
            input=record.input,
            classes=record.classes,
            members=record.members,
            provenance=Provenance(config=config),
        )
        return store.publish(published, staged, draft)


@pytest.fixture
def several(store):
    for seed in range(6):
        publish(store, "e", (seed,))
    store.activate("e", 2)
    return store


def test_the_newest_and_the_active_version_stay(several):
    found = upkeep.collect_garbage(several, 2)
    assert found.done == ["e@1", "e@3", "e@4"]
    assert found.kept == {"e@2": "it is active"}
    assert several.versions("e") == [2, 5, 6]
    for version in (2, 5, 6):
        several.verify(several.load("e", version))
    assert several.active("e") == 2
    assert not list(several.root.glob("e/.staging*"))


def test_a_number_that_was_removed_is_not_given_again(several):
    several.activate("e", 1)
    upkeep.collect_garbage(several, 1)
    for version in (6, 1):
        several.activate("e", 1)
        several.remove("e", version)
    assert publish(several, "e", (9,)).manifest.version == 7


def test_showing_removes_nothing(several):
    before = tree(several)
    assert upkeep.collect_garbage(several, 2, dry=True).done == ["e@1", "e@3", "e@4"]
    assert tree(several) == before


@pytest.mark.parametrize("reference", ["e@3", "e@3/0"])
def test_a_version_that_another_was_trained_from_stays(several, reference):
    based(several, "other", init=[reference], name="e@4")
    found = upkeep.collect_garbage(several, 2)
    assert found.done == ["e@1", "e@4"]
    assert found.kept["e@3"] == "other@2 is based on it"


def test_a_reference_without_a_number_keeps_the_newest_of_that_time(several):
    based(several, "other", endpoints=["e/0", "somewhere/file.pt"])
    assert upkeep.collect_garbage(several, 1).done == ["e@1", "e@3", "e@4", "e@5", "other@1"]


def test_nothing_is_removed_while_a_manifest_cannot_be_read(several):
    (several.root / "e/5/manifest.json").write_text("{")
    before = tree(several)
    found = upkeep.collect_garbage(several, 1)
    assert found.done == []
    assert list(found.damaged) == ["e@5"]
    assert tree(several) == before


def test_a_killed_removal_leaves_nothing_that_is_taken_for_a_version(several):
    (several.root / "e/3").rename(several.root / "e/.staging-removed-3")
    assert several.versions("e") == [1, 2, 4, 5, 6]
    publish(several, "e", (8,))
    assert not list(several.root.glob("e/.staging*"))


def test_a_backup_is_the_store_again_and_grows_by_what_is_new(several, tmp_path):
    publish(several, "f", (1,), activate=False)
    copy = Store(tmp_path / "backup")
    assert len(upkeep.copy_all(several, copy).done) == 7
    assert tree(copy) == tree(several)
    assert copy.active("e") == 2
    with pytest.raises(EnsembleNotFoundError):
        copy.active("f")
    publish(several, "e", (9,))
    assert upkeep.copy_all(several, copy).done == ["e@7"]
    assert tree(copy) == tree(several)
    restored = Store(tmp_path / "restored")
    upkeep.copy_all(copy, restored)
    assert tree(restored) == tree(several)
    assert restored.activation_order() == several.activation_order()


def test_a_damaged_version_does_not_keep_the_others_from_the_backup(several, tmp_path):
    (several.root / "e/3/manifest.json").write_text("{")
    copy = Store(tmp_path / "backup")
    found = upkeep.copy_all(several, copy)
    assert list(found.damaged) == ["e@3"]
    assert copy.versions("e") == [1, 2, 4, 5, 6]


def test_a_restore_never_activates_what_it_copies_in_passing(several, tmp_path, monkeypatch):
    copy, seen = Store(tmp_path / "backup"), []
    monkeypatch.setattr(
        copy._activations,
        "replace",
        lambda name, version, real=copy._activations.replace: (seen.append(version), real(name, version)),
    )
    upkeep.copy_all(several, copy)
    assert seen == [2]


def test_the_commands_say_what_they_do(several, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "models_store", *arguments], capture_output=True, text=True, env={"MODELS_STORE": str(several.root), "PATH": ""}
        )  # fmt: skip

    assert run("backup", str(tmp_path / "b")).stdout.count("copied") == 6
    assert "would remove e@1" in run("gc", "--keep", "1", "--dry-run").stdout
    assert "removed e@1" in run("gc", "--keep", "1").stdout
    assert run("gc", "--keep", "0").returncode != 0
    assert run("restore", str(tmp_path / "b")).stdout.count("copied") == 4
    assert several.versions("e") == [1, 2, 3, 4, 5, 6]
