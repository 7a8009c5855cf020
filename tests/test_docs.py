"""What README.md and the pages of docs/ promise: their links lead somewhere, and the commands and options they show exist."""

import ast
import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
page = pytest.mark.parametrize("page", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())


def anchors(file):
    """The anchors of a page's headings, as Python-Markdown and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
    plain = [re.sub(r"[`*]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings]
    ascii_ = [unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode() for one in plain]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", one).strip().lower()) for one in ascii_}


@page
def test_relative_links_lead_to_a_file_and_to_a_heading_in_it(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("file", sorted((ROOT / "docs").rglob("*.md")), ids=lambda file: file.name)
def test_a_page_links_to_nothing_that_is_not_part_of_the_site(file):
    for target in LINK.findall(file.read_text()):
        path = target.partition("#")[0]
        assert (file.parent / path).resolve().is_relative_to(ROOT / "docs"), target


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


@page
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m (models_store|(?:training|benchmarks|deploy)\.[\w.]*\w)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        if not path.name.isupper():  # NAME, COMMAND
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def fields(file):
    """The names of annotated fields in a file's classes, as command-line options."""
    classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    return {
        f"--{line.target.id.replace('_', '-')}" for c in classes for line in c.body if isinstance(line, ast.AnnAssign)
    }


@pytest.mark.parametrize("file", sorted((ROOT / "docs/methods").glob("*.md")), ids=lambda file: file.stem)
def test_options_in_a_methods_table_are_options_of_that_command(file):
    known = fields(ROOT / "training" / f"{file.stem}.py") | fields(ROOT / "training" / "config.py")
    rows = re.findall(r"^\| (`--.*?) \|", file.read_text(), re.MULTILINE)
    shown = {option for row in rows for option in re.findall(r"--[\w-]+", row)}
    assert shown
    assert shown <= known


def test_every_method_has_a_page_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    commands = [f for f in (ROOT / "training").glob("*.py") if "method: ClassVar[str] =" in f.read_text()]
    assert commands
    assert not [f.stem for f in commands if f"methods/{f.stem}.md" not in navigation]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [
        f.name
        for f in PAGES
        if f.is_relative_to(ROOT / "docs") and f.relative_to(ROOT / "docs").as_posix() not in navigation
    ]
