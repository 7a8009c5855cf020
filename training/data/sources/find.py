"""Finds the source of a data set by its name."""

from __future__ import annotations

from training.data.forms import texts
from training.data.import_string import import_string
from training.data.options import DataOptions
from training.data.sources import BUILT_IN, Source, embedded, from_user, image_folder, tables
from training.errors import DataError

FOLDER = "imagefolder:"


def _texts(options: DataOptions) -> tables.Texts | None:
    if options.longest is not None and options.longest < 1:
        raise DataError(f"--longest must be at least 1; got {options.longest}.")
    if options.tokenizer is None:
        if options.text is not None or options.longest is not None:
            raise DataError("--text and --longest are for texts that a tokenizer reads: give --tokenizer FILE.")
        return None
    return tables.Texts(options.text or "text", texts.form(options.tokenizer, options.longest))


def find(options: DataOptions) -> Source:
    """The source of a data set.

    Raises:
        DataError: the data set is unknown, missing or malformed.
        ImportStringError: its import string cannot be imported.
    """
    name = options.dataset
    read_by = _texts(options)
    if name.startswith(FOLDER):
        return image_folder.source(name.removeprefix(FOLDER), options.image_size or image_folder.SIZE, options.group)
    if tables.is_one(name):
        return tables.source(name, options.label, options.drop, options.split_seed, options.group, read_by)
    if options.tokenizer is not None:
        raise DataError(
            f"--tokenizer is for csv and parquet files with a column of texts; {name!r} is neither. A data set of your own gives `tokenizer`."
        )
    if options.group is not None:
        raise DataError(
            f"--group is a column of a csv or parquet file, or a pattern of file names of an imagefolder; {name!r} is neither. A data set of your "
            "own gives `groups`, one value for each training row."
        )
    if ":" in name:
        factory = import_string(name)
        try:
            made = factory()
        except Exception as error:
            raise DataError(f"Data factory {name!r} failed with {type(error).__name__}: {error}") from error
        return from_user(name, made)
    known = {**BUILT_IN, **embedded.BUILT_IN}
    if name in known:
        return known[name]()
    raise DataError(
        f"Unknown data set {name!r}. Known: {', '.join(known)}, imagefolder:PATH, npz:PATH, csv:PATH, parquet:PATH, or your own as "
        "package.module:factory."
    )
