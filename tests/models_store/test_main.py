import json
import os
import shutil
import subprocess
import sys

import onnx
import pytest

from models_store.__main__ import main
from models_store.store import Store
from tests.conftest import ROOT
from tests.onnx_members import linear, publish


@pytest.fixture
def run(store, capsys):
    def run(*arguments):
        code = main(["--store", str(store.root), *map(str, arguments)])
        return code, capsys.readouterr()

    return run


def test_list_marks_the_active_version(store, run):
    publish(store, "a")
    publish(store, "a", activate=False)
    code, out = run("list")
    assert code == 0
    assert [line.split()[:2] for line in out.out.splitlines()] == [["*", "a@1"], ["a@2", "fge"]]


def test_list_of_an_empty_store_says_what_to_do(run):
    assert "training.fge" in run("list")[1].out
    assert run("list", "--quiet")[1].out == ""


def test_show_prints_the_manifest(store, run):
    version = publish(store, "a")
    assert run("show", "a@1")[1].out == version.manifest.dump()


def test_verify_counts_damage_in_its_exit_code(store, run):
    version = publish(store, "a")
    assert run("verify")[0] == 0
    (version.folder / "members/000.onnx").write_bytes(b"")
    code, out = run("verify")
    assert code == 1
    assert "damaged  a@1" in out.out


def test_deactivate_diff_and_card_say_what_they_did(store, run):
    publish(store, "a")
    publish(store, "a", temperature=2.0)
    code, out = run("diff", "a@1", "a@2")
    assert code == 0
    assert ["temperature", "1", "2"] in [line.split() for line in out.out.splitlines()]
    assert run("card", "a")[1].out.startswith("# a, version 2")
    assert run("deactivate", "a")[0] == 0
    assert [line.split()[0] for line in run("list")[1].out.splitlines()] == ["a@1", "a@2"]
    assert run("deactivate", "a")[0] == 2


def test_activate_refuses_a_damaged_version(store, run):
    publish(store, "a")
    version = publish(store, "a")
    store.activate("a", 1)
    (version.folder / "members/000.onnx").write_bytes(b"")
    assert run("activate", "a", 2)[0] == 2
    assert store.active("a") == 1


def test_import_and_export_make_stores(store, run, tmp_path):
    onnx.save(linear(0), tmp_path / "m.onnx")
    assert run("import", "zoo", tmp_path / "m.onnx", "--classes", "x,y,z")[0] == 0
    assert run("export", "zoo", tmp_path / "copy")[0] == 0
    copy = Store(tmp_path / "copy")
    copy.verify(copy.load("zoo"))
    assert copy.load("zoo").manifest.classes == ["x", "y", "z"]
    assert run("export", "zoo", tmp_path / "copy")[0] == 2


def test_errors_are_one_line_and_exit_code_2(run):
    code, out = run("show", "nothing")
    assert code == 2
    assert out.err.startswith("error: ")
    assert out.err.count("\n") == 1


BROKEN = {
    "deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "removed": lambda folder: shutil.rmtree(folder / "members"),
    "link": lambda folder: folder.rename(folder.parent / "x") and folder.symlink_to(folder.parent / "x"),
    "fifo": lambda folder: (folder / "manifest.json").unlink() or os.mkfifo(folder / "manifest.json"),
    "not utf-8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "active": lambda folder: (folder.parent / "active").write_bytes(b"\xff" * 5000),
    "active elsewhere": lambda folder: (folder.parent / "active").write_text("7\n"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_one_broken_version_stops_neither_list_nor_verify(store, run, harm):
    for name in "abc":
        publish(store, name)
    BROKEN[harm](store.root / "b/1")
    code, out = run("verify")
    assert code == 1
    assert sum(line.startswith("damaged  b") for line in out.out.splitlines()) == 1
    assert {"ok       a@1", "ok       c@1"} <= set(out.out.splitlines())
    code, out = run("list")
    assert code == 0
    assert [line.split()[1] for line in out.out.splitlines() if line.startswith("* ") and "b@1" not in line] == [
        "a@1",
        "c@1",
    ]
    assert run("list", "--quiet")[1].out == "a\nb\nc\n"


def test_an_ensemble_of_which_nothing_is_active_is_not_damaged(store, run):
    publish(store, "a", activate=False)
    assert run("verify")[0] == 0
    assert run("list")[1].out.startswith("  a@1")


def test_import_without_activation_says_how_to_serve_it(run, store, tmp_path):
    onnx.save(linear(0), tmp_path / "m.onnx")
    code, out = run("import", "zoo", tmp_path / "m.onnx", "--no-activate")
    assert code == 0
    assert "python -m models_store activate zoo 1" in out.out
    assert store.activation_order() == []


def test_an_exported_store_knows_what_was_activated(store, run, tmp_path):
    for name in ("b", "a"):
        publish(store, name)
    for name in ("b", "a"):
        assert run("export", name, tmp_path / "copy")[0] == 0
    assert Store(tmp_path / "copy").activation_order() == ["b", "a"]
    assert json.loads(run("show", "a")[1].out)["digest"] == store.load("a").manifest.digest


def test_an_address_as_the_store_is_refused_with_the_reason(capsys):
    assert main(["--store", "ftp://bucket/x", "list"]) == 2
    assert "is not an address of object storage" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["9" * 5000, "0", "-1", "x", ""])
def test_a_version_that_is_no_number_is_refused(store, run, version):
    publish(store, "a")
    code, out = run("show", f"a@{version}")
    assert code == 2
    assert "NAME@VERSION" in out.err


def test_a_reader_that_stops_reading_ends_the_command_silently(store):
    for index in range(40):
        (store.root / f"name-{index}" / "1").mkdir(parents=True)
        (store.root / f"name-{index}" / "1" / "manifest.json").write_text("{}" * 1000)
    command = f"{sys.executable} -u -m models_store --store {store.root} list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
