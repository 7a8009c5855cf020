"""Rules for imports between packages, for errors, and for the documented file tree."""

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"modepath", "training", "models_store", "service"}
ALLOWED = {
    "modepath": {"modepath", "training", "models_store", "service"},
    "training": {"training", "models_store"},
    "service": {"service", "models_store"},
    "models_store": {"models_store"},
}
FORBIDDEN = {
    "service": {"torch", "torchvision", "lightning_fabric"},
    "models_store": {"torch", "torchvision", "lightning_fabric", "bentoml", "starlette"},
    "training": {"bentoml", "starlette"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


FILES = [file for room in sorted(OURS) for file in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(file):
    package = file.relative_to(ROOT).parts[0]
    found = set(imports(file))
    assert found & OURS <= ALLOWED[package]
    assert not found & FORBIDDEN.get(package, set())


# Each layer may import itself and those before it; commands may import all of them.
LAYERS = [
    "errors",
    "data",
    "config",
    "networks",
    "geometry",
    "runs",
    "members",
    "optimisation",
    "cluster",
    "measurement",
    "command",
    "pipeline",
]
TRAINING = [file for file in FILES if file.is_relative_to(ROOT / "training")]
COMMANDS = {file.stem for file in TRAINING if "command.main(" in file.read_text()}


def layers_imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            yield from (alias.name for alias in node.names if alias.name != "logger")  # of the package itself
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("training."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_inside_training_point_downwards_only(file):
    unit = file.relative_to(ROOT / "training").parts[0].removesuffix(".py")
    if unit == "__init__":
        return
    allowed = set(LAYERS) | {"curve"} if unit in COMMANDS else set(LAYERS[: LAYERS.index(unit) + 1])
    if unit == "landscape":
        allowed |= COMMANDS  # it plots what they trained
    assert set(layers_imported(file)) <= allowed


def test_no_folder_has_more_than_14_modules():
    modules = [file for file in FILES if file.name != "__init__.py"]
    counts = Counter(str(file.parent.relative_to(ROOT)) for file in modules)
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_only_the_runtime_makes_onnx_runtime_sessions():
    makers = [file.relative_to(ROOT).as_posix() for file in FILES if "InferenceSession(" in file.read_text()]
    assert makers == ["models_store/graphs/runtime.py"]


def test_only_one_place_makes_members():
    users = [f.relative_to(ROOT).as_posix() for f in FILES if "batch_norm.reestimate(" in f.read_text()]
    assert users == ["training/members/member.py"]


def test_no_room_is_called_utils():
    banned = {"utils", "common", "helpers", "core", "manager", "handler"}
    assert not [file for file in FILES if banned & {part.removesuffix(".py") for part in file.relative_to(ROOT).parts}]


def test_the_store_and_the_service_load_no_torch():
    code = "import sys, models_store.importing, models_store.__main__, service.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def error_classes(module, base):
    return [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, base) and c is not base]


def test_every_service_error_has_a_status_of_its_own_and_stands_in_the_tree():
    from service.http import errors

    classes = error_classes(errors, errors.ServiceError)
    assert classes
    for error in classes:
        assert "status" in vars(error), error
        assert 400 <= error.status < 600
        assert f"{error.__name__} " in errors.__doc__
        assert str(error.status) in errors.__doc__


def test_every_store_and_training_error_is_caught_by_a_door_and_stands_in_the_tree():
    from models_store import errors as store_errors

    assert all(c.__name__ in store_errors.__doc__ for c in error_classes(store_errors, store_errors.StoreError))
    pytest.importorskip("torch", reason="the training extra is not installed")
    from training import errors as training_errors

    classes = error_classes(training_errors, training_errors.TrainingError)
    assert classes
    assert all(c.__name__ in training_errors.__doc__ for c in classes)


def files_of_the_tree(text):
    """Files named in an indented tree with two columns per level, in which `folder/` starts a level."""
    found, folders = set(), []
    for line in text.splitlines():
        if match := re.match(r"    ((?:  )*)(\S+)(?:$|\s{2,})", line):
            folders = folders[: len(match[1]) // 2]
            if match[2].endswith("/"):
                folders.append(match[2])
            else:
                found.add("".join(folders) + match[2])
    return found


def test_the_tree_in_the_documentation_names_every_file_and_no_other():
    named = files_of_the_tree((ROOT / "docs" / "architecture.md").read_text())
    there = {file.relative_to(ROOT).as_posix() for file in FILES if file.name != "__init__.py"}
    assert there - named == set()
    assert {file for file in named if not (ROOT / file).is_file()} == set()
