"""The command `modepath`: train, evaluate, serve and predict from any folder.

modepath fge --dataset imagefolder:photos --network torchvision:resnet18 --epochs 40 --name pets
modepath evaluate pets
modepath serve
modepath predict pets a.jpg b.jpg --csv answers.csv
modepath store list
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from models_store.errors import ModepathError

COMMANDS = {
    "fge": "train a fast geometric ensemble within one budget",
    "independent": "train a deep ensemble",
    "snapshot": "train a snapshot ensemble",
    "curve": "train a low-loss curve between two networks",
    "espro": "grow low-loss simplexes around networks",
    "swag": "fit a Gaussian to the weights of a training run, and sample networks from it",
    "csgmcmc": "sample the posterior with cyclical SG-MCMC",
    "soup": "average weights into one network, chosen greedily by validation accuracy",
    "evaluate": "measure a published ensemble",
    "landscape": "plot the loss around published networks",
}
BATCH = 64


def main() -> NoReturn:
    """Run a command; exit with its status."""
    _own_packages_first()
    parser = argparse.ArgumentParser(
        "modepath", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shtab.add_argument_to(parser, "--print-completion", help="print the completion script of a shell, and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    commands.add_parser(
        "store", help="list, show, verify, activate, import and export published ensembles", add_help=False
    )
    commands.add_parser("feedback", help="export images that were kept for relabelling", add_help=False)
    commands.add_parser("keys", help="make, list and revoke the API keys of a service", add_help=False)
    commands.add_parser(
        "serve", help="serve all active ensembles over HTTP; takes the options of bentoml serve", add_help=False
    )
    predict = commands.add_parser("predict", help="classify image files, without a server")
    predict.add_argument("name", help="NAME of a published ensemble, or NAME@VERSION")
    images: Any = predict.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    images.complete = shtab.FILE
    predict.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the table to this file instead of standard output"
    )
    predict.add_argument("--store", type=Path, help="folder of published ensembles (default: $MODELS_STORE)")
    options, rest = parser.parse_known_args()
    if options.command == "predict":
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        try:
            _predict(options.name, options.images, options.csv, options.store)
        except (ModepathError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        sys.exit(0)
    arguments = sys.argv[sys.argv.index(options.command) + 1 :]
    if options.command == "serve":
        _serve(arguments)
    sys.argv = [f"modepath {options.command}", *arguments]
    if options.command == "store":
        sys.exit(importlib.import_module("models_store.__main__").main())
    if options.command == "feedback":
        sys.exit(importlib.import_module("service.feedback.export").main())
    if options.command == "keys":
        sys.exit(importlib.import_module("service.access.commands").main())
    method = importlib.import_module(f"training.{options.command}")
    importlib.import_module("training.command").main(method.Config, method.run, method.__doc__)
    sys.exit(0)


def _own_packages_first() -> None:
    """Move the working folder to the end of sys.path, so that a `training.py` or `service/` in it cannot shadow ours.

    Modules that exist only in the working folder can still be imported.
    """
    here, ours = str(Path.cwd()), str(Path(__file__).parents[1])
    others = [entry for entry in sys.path if entry not in ("", ".", here, ours)]
    sys.path[:] = [ours, *others, here]


def _serve(arguments: Sequence[str]) -> NoReturn:
    if "MODELS_STORE" in os.environ:
        os.environ["MODELS_STORE"] = str(Path(os.environ["MODELS_STORE"]).absolute())
    folder = str(Path(__file__).parents[1])
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    if not Path(bentoml).exists():
        print("error: bentoml is not installed here: pip install 'modepath[service]'", file=sys.stderr)
        sys.exit(2)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execv(bentoml, [bentoml, "serve", "service.bento:Modepath", "--working-dir", folder, *arguments])


def _predict(name: str, images: Sequence[Path], table: Path | None, store: Path | None) -> None:
    from tqdm import tqdm

    from modepath.ensemble import load

    ensemble = load(name, store=store)
    files = [file for given in images for file in (_files_in(given) if given.is_dir() else [given])]
    with table.open("w", newline="") if table else sys.stdout as out:
        writer = csv.writer(out)
        measures = ["confidence", "predictive_entropy", "expected_entropy", "mutual_information", "disagreement"]
        writer.writerow(["file", "class", *measures, *(f"probability of {one}" for one in ensemble.classes)])
        bar = tqdm(total=len(files), unit="image", disable=None if table else True)
        for first in range(0, len(files), BATCH):
            batch = files[first : first + BATCH]
            answer = ensemble.predict([str(file) for file in batch])
            for row, file in enumerate(batch):
                numbers = [float(getattr(answer, measure)[row]) for measure in measures]
                writer.writerow([file, answer.class_names[row], *numbers, *answer.probs[row].tolist()])
            bar.update(len(batch))
        bar.close()


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


if __name__ == "__main__":
    main()
