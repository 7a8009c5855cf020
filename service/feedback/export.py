"""modepath feedback export: write the kept images into folders that `--dataset imagefolder:` reads.

DIR/labelled/CLASS/REQUEST-ROW.png      by the label that was reported
DIR/unlabelled/CLASS/REQUEST-ROW.png    by the predicted class, to be checked by a person
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.exc import SQLAlchemyError

from models_store.errors import ModepathError
from models_store.store import Store
from service.feedback.database import Database
from service.operations.settings import settings


def export(database: Database, store: Store, folder: Path, ensemble: str | None = None) -> tuple[int, int, int]:
    """Write the kept images, and return the number of labelled, unlabelled and skipped ones.

    Args:
        database: holds the images.
        store: holds the classes of their ensembles.
        folder: where the images go. Files that exist are replaced.
        ensemble: only images that this ensemble answered; None: all.
    """

    @cache
    def classes(name: str, version: int) -> list[str]:
        try:
            return store.load(name, version).manifest.classes
        except ModepathError:  # it was removed; its classes are numbered
            return []

    counts = {"labelled": 0, "unlabelled": 0}
    skipped = 0
    for request_id, row, file, answer, label in database.images():
        if answer is None or (ensemble is not None and answer.ensemble != ensemble):
            skipped += 1
            continue
        kind, number = ("unlabelled", int(answer.labels[row])) if label is None else ("labelled", label)
        names = classes(answer.ensemble, answer.version)
        # A class name may hold a slash, as in "T-shirt/top".
        place = folder / kind / (quote(names[number], safe=" ,()'&+") if names else str(number))
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{request_id}-{row}.png").write_bytes(file)
        counts[kind] += 1
    return counts["labelled"], counts["unlabelled"], skipped


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser("modepath feedback", description="Answers that wait for their labels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="write kept images into folders that --dataset imagefolder: reads")
    command.add_argument(
        "dir", metavar="DIR", type=Path, help="the images go to DIR/labelled/CLASS and DIR/unlabelled/CLASS"
    )
    command.add_argument("--ensemble", metavar="NAME", help="only images that this ensemble answered")
    command.add_argument(
        "--database", metavar="URL", help="database of the answers (default: that of MODEPATH_FEEDBACK)"
    )
    args = parser.parse_args()
    try:
        url = args.database or settings().feedback
        if url == "off":
            raise ModepathError("MODEPATH_FEEDBACK is off, so there is no database; name one with --database.")
        labelled, unlabelled, skipped = export(Database(url), Store(), args.dir, args.ensemble)
    except (ModepathError, SQLAlchemyError, ImportError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(
        f"{labelled} labelled images in {args.dir / 'labelled'}, {unlabelled} without a label in {args.dir / 'unlabelled'}"
        + (f"; {skipped} of other ensembles, or whose answer is not kept any more" if skipped else "")
    )
    return 0
