"""Build a bento that serves one published ensemble, with its code and its pinned requirements: `make bento NAME=…`.

    python -m deploy.bento NAME[@VERSION] [--out dist]

Puts the bento `modepath:NAME-VERSION` into BentoML's store (for `bentoml containerize`, `bentoml push`), and an
unpacked copy into OUT, where `bentoml serve` needs neither this checkout nor torch. Requirements are pinned to the
installed versions, because the tests were run with these.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import bentoml
import bentoml.exceptions
from packaging.requirements import Requirement

from models_store.errors import StoreError
from models_store.manifest import Manifest
from models_store.store import Store, Version

ROOT = Path(__file__).parents[1]
MAX_TAG = 63
ROOMS = ("service", "models_store")
DESCRIPTION = """\
`{name}`, an ensemble of {members} members. `bentoml serve` this folder, then:

    POST /predict     images as JSON, application/x-npy, image/png or image/jpeg -> averaged probabilities and their uncertainty
    GET /docs.json    the whole interface      GET /metrics    for Prometheus      GET /readyz    whether it is ready

Settings are environment variables `MODEPATH_…`, such as `MODEPATH_HOST=0.0.0.0` and `MODEPATH_WORKERS`.
"""


def main() -> int:
    """Build the bento and print where it is stored. Returns 0 on success, 1 on an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", metavar="NAME[@VERSION]")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the unpacked bento (default: dist)")
    args = parser.parse_args()
    try:
        store = Store()
        version = store.resolve(args.name)
        store.verify(version)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tag = f"modepath:{version.manifest.name}-{version.manifest.version}"
    if version.manifest.name.lower() != version.manifest.name or len(tag.partition(":")[2]) > MAX_TAG:
        print(
            f"error: {version.manifest.name!r} cannot be a bento's version: BentoML takes lower case and {MAX_TAG} "
            "characters at most. Publish it under another name.",
            file=sys.stderr,
        )
        return 1
    unpacked: Path = args.out / tag.replace(":", "-")
    if unpacked.exists():
        print(f"error: {unpacked} exists already; give another --out, or remove it.", file=sys.stderr)
        return 1
    try:
        bento_tag = build(tag, version, unpacked)
    except OSError as error:
        print(
            f"error: the bento cannot be written: {error}. BentoML's store is in BENTOML_HOME (default: ~/bentoml), "
            f"the unpacked copy goes to {args.out}. Check that both are writable and that their disks are not full.",
            file=sys.stderr,
        )
        return 1
    print(f"{bento_tag} is in BentoML's store, and unpacked in {unpacked}. To serve it anywhere:")
    print(f"  cd {unpacked} && pip install -r env/python/requirements.txt && bentoml serve")
    return 0


def build(tag: str, version: Version, unpacked: Path) -> str:
    """Build the bento in BentoML's store and unpack it. Returns its tag.

    Raises:
        OSError: a folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        copy_sources(context, version)
        with contextlib.suppress(bentoml.exceptions.NotFound):
            bentoml.delete(tag)  # a published version never changes, but the code may have
        bento = bentoml.build(
            "service.bento:Modepath",
            version=tag.partition(":")[2],
            include=["**"],
            description=DESCRIPTION.format(name=version.name, members=len(version.manifest.members)),
            python={
                "packages": pinned_requirements(*_extras(version.manifest)),
                "lock_packages": False,
            },
            build_ctx=str(context),
        )
        shutil.copytree(bento.path, unpacked)
        return str(bento.tag)


def copy_sources(context: Path, version: Version) -> None:
    """Copy the packages that serving needs, and a store with this one version in its default folder."""
    for room in ROOMS:
        ignored = shutil.ignore_patterns("ensembles", "__pycache__")
        shutil.copytree(ROOT / room, context / room, ignore=ignored)
    Store(context / "models_store" / "ensembles").adopt(version)


def _extras(manifest: Manifest) -> list[str]:
    """The extras that the version needs, and that of gRPC if it is installed here."""
    texts = ["texts"] if manifest.input.tokenizer else []
    beside = {"grpc": "grpc_health", "postgres": "psycopg", "remote": "obstore"}
    return [*texts, *(extra for extra, package in beside.items() if importlib.util.find_spec(package))]


def pinned_requirements(*extras: str) -> list[str]:
    """The requirements of the service and of these extras, each pinned to the installed version if it is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    needed = [*project["dependencies"], *optional["service"], *(one for extra in extras for one in optional[extra])]
    return [_pinned(Requirement(requirement)) for requirement in needed]


def _pinned(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:  # a requirement of another platform
        return str(requirement)
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={version}{marker}"


if __name__ == "__main__":
    sys.exit(main())
