import onnx
import pytest

from models_store.__main__ import main
from models_store.store import Store
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
