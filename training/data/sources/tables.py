"""Arrays and tables in files: npz:PATH, csv:PATH and parquet:PATH.

A table has named columns. Numbers become features as they are, texts and truth values become categories; the encoding is
kept in the manifest, so that the service takes rows with the same names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models_store.errors import FieldError
from models_store.inputs import fields
from models_store.manifest import TableField
from training.data import splitting
from training.data.forms import FeatureForm, TokenForm
from training.data.sources import Source, from_user
from training.errors import DataError

LABEL = "label"  # the column of the classes, if no other is named
TEST = 0.2  # share of the rows of a table in one file
CATEGORIES = 256  # more of them are rather an identifier
SPLITS = ("train", "validation", "test")


def is_one(name: str) -> bool:
    """Whether a data set's name is that of a file that is read here."""
    return name.startswith(("npz:", "csv:", "parquet:"))


@dataclass(frozen=True)
class Texts:
    """A table of which one column is a text."""

    column: str
    form: TokenForm


def source(
    name: str, label: str | None, drop: Sequence[str], seed: int, group: str | None = None, texts: Texts | None = None
) -> Source:
    """Read a data set.

    Args:
        name: npz:FILE; csv:PATH or parquet:PATH, a file, of which a part becomes the test split, or a folder with
            train, test and optionally validation.
        label: the column of the classes.
        drop: columns that are not used.
        seed: of the choice of the test rows.
        group: a column that is not used as a feature; rows with equal values stay in one split.
        texts: the column of texts, the only one that is used, and how they are read.

    Raises:
        DataError: the file cannot be read, or does not hold such a data set.
    """
    kind, _, path = name.partition(":")
    if kind == "npz":
        if texts is not None:
            raise DataError("--tokenizer is for tables; an npz file holds token ids, and `vocabulary`, their number.")
        if group is not None:
            raise DataError("--group is for tables; an npz file holds the array `groups`, one value for each row of x.")
        return _npz(name, Path(path))
    if texts is not None:
        return _texts(kind, Path(path), label or LABEL, texts, drop, seed, group)
    return _table(name, kind, Path(path), label or LABEL, drop, seed, group)


def _npz(name: str, file: Path) -> Source:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is not an npz file: {error}. Write it with numpy.savez(file, x=…, y=…).") from None
    x = _inputs(arrays, "x")
    if x is None or "y" not in arrays:
        raise DataError(
            f"{file} has the arrays {', '.join(arrays) or 'none'}; it needs x (inputs; or x/NAME for several named ones) and y (labels)."
        )
    made: dict[str, Any] = {"train": (x, arrays["y"]), "validation": None}
    for split in SPLITS[1:]:
        if (own := _inputs(arrays, f"x_{split}")) is not None and f"y_{split}" in arrays:
            made[split] = own, arrays[f"y_{split}"]
    _check_lengths(file, x, arrays)
    if "test" not in made:
        of_classes = (
            arrays["y"].argmax(axis=1)
            if arrays["y"].ndim == 2 and arrays["y"].shape[1] > 1
            else arrays["y"].reshape(-1)
        )
        train, test = _split(of_classes, 0, arrays.get("groups"))
        made["train"], made["test"] = ((_take(x, rows), arrays["y"][rows]) for rows in (train, test))
        for extra in ("groups", "weights"):
            if extra in arrays:
                arrays[extra] = arrays[extra][train]
    for extra in ("groups", "weights"):
        if extra in arrays:
            made[extra] = arrays[extra]
    for extra in ("kind", "vocabulary", "classes"):
        if extra in arrays:
            made[extra] = arrays[extra].tolist()
    return from_user(name, made)


def _check_lengths(file: Path, x: Any, arrays: dict[str, Any]) -> None:
    own = {f"x/{name}": array for name, array in x.items()} if isinstance(x, dict) else {"x": x}
    own |= {name: arrays[name] for name in ("y", "groups", "weights") if name in arrays}
    lengths = {name: len(array) if array.ndim else None for name, array in own.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise DataError(f"The arrays of {file} must have one row each for each training row; they have {lengths}.")
    for split in SPLITS[1:]:
        other = _inputs(arrays, f"x_{split}")
        if other is not None and isinstance(other, dict) != isinstance(x, dict):
            raise DataError(f"{file}: x has {'named' if isinstance(x, dict) else 'unnamed'} inputs, x_{split} has not.")


def _inputs(arrays: dict[str, Any], name: str) -> Any:
    """The array of this name, or the named ones below it; None if there is none."""
    named = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
    return arrays.get(name, named or None)


def _take(inputs: Any, rows: Any) -> Any:
    return {key: array[rows] for key, array in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def _table(name: str, kind: str, path: Path, label: str, drop: Sequence[str], seed: int, group: str | None) -> Source:
    frames = _frames(kind, path)
    train = frames["train"]
    columns = [column for column in train.columns if column not in (label, group) and column not in drop]
    if "" in columns:
        raise DataError(
            f"{path} has a column without a name, such as the index that pandas writes: leave it out (to_csv(index=False)), or name it."
        )
    if any(frame.height == 0 for frame in frames.values()):
        raise DataError(f"{path} has no rows.")
    for split, frame in frames.items():
        if label not in frame.columns:
            raise DataError(
                f"{path} has no column {label!r} in its {split} rows; name the column of the classes with --label. Its columns: "
                f"{', '.join(frame.columns)}."
            )
        if group is not None and group not in frame.columns:
            raise DataError(
                f"--group: {path} has no column {group!r} in its {split} rows. Its columns: {', '.join(frame.columns)}."
            )
        if missing := [column for column in columns if column not in frame.columns]:
            raise DataError(f"The {split} rows of {path} lack the column {missing[0]!r} of the training rows.")
    if unknown := sorted(set(drop) - set(train.columns)):
        raise DataError(f"--drop: {path} has no column {unknown[0]!r}. Its columns: {', '.join(train.columns)}.")
    described = tuple(_field(path, column, list(frames.values())) for column in columns)
    if not described:
        raise DataError(f"{path} has no column beside {label!r}, so there is nothing to classify by.")
    for split, frame in frames.items():
        if gone := frame[label].null_count():
            raise DataError(
                f"{gone} of the {split} rows of {path} have no class in {label!r}; fill them in or leave these rows out."
            )
    numbers = [field.name for field in described if field.categories is None]
    gaps = sorted(column for column in numbers if any(frame[column].null_count() for frame in frames.values()))
    form = FeatureForm(missing="mean" if gaps else "refuse", fields=described)
    spec = form.spec((sum(field.width for field in described),))
    names = sorted({_text(value) for frame in frames.values() for value in frame[label].to_list()})
    encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for split, frame in frames.items():
        try:
            rows = [_row(row, described) for row in frame.select(columns).to_dicts()]
            encoded[split] = torch.from_numpy(fields.encode(rows, spec)), _labels(frame[label].to_list(), names)
        except FieldError as error:
            raise DataError(f"The {split} rows of {path}: {error}.") from None
    groups, own_notes = _groups_of(path, frames["train"], group), list[str]()
    if "test" not in encoded:
        x, y = encoded["train"]
        of_train, of_test = _split(y.numpy(), seed, groups)
        encoded |= {"train": (x[of_train], y[of_train]), "test": (x[of_test], y[of_test])}
        groups = groups and [groups[i] for i in of_train.tolist()]
        own_notes = splitting.note(len(of_test), len(y), TEST, "test") if groups else []
    notes = [f"{len(columns)} columns become {spec.shape[0]} features; the class is {label!r}"]
    notes += [*_shared_groups(group, frames), *own_notes]
    for field in described:
        seen = (
            {_text(value) if value is not None else "" for value in train[field.name].to_list()}
            if field.categories
            else set()
        )
        if field.categories and (unseen := sorted(set(field.categories) - seen)):
            notes.append(
                f"warning: no training row has {unseen[0]!r} in {field.name}: what the networks answer to it is not learnt"
            )
    notes += [f"missing numbers in {', '.join(gaps)} are replaced by the mean"] if gaps else []
    parts = encoded["train"], encoded.get("validation"), encoded["test"]
    return Source(parts, names, form=form, notes=tuple(notes), groups=groups)


def _groups_of(path: Path, frame: Any, group: str | None) -> list[Any] | None:
    if group is None:
        return None
    if gone := frame[group].null_count():
        raise DataError(f"{gone} rows of {path} have no group in {group!r}; fill them in or leave these rows out.")
    return frame[group].to_list()


def _shared_groups(group: str | None, frames: dict[str, Any]) -> list[str]:
    own = {split: set(frame[group].to_list()) for split, frame in frames.items()} if group is not None else {}
    return [
        f"warning: {len(shared)} groups of the {split} rows are in the training rows, too: their scores are too good"
        for split in SPLITS[1:]
        if (shared := own.get(split, set()) & own.get("train", set()))
    ]


def _texts(
    kind: str, path: Path, label: str, texts: Texts, drop: Sequence[str], seed: int, group: str | None
) -> Source:
    if drop:
        raise DataError("--drop is for tables of features; of a table of texts only the text is used.")
    frames = _frames(kind, path)
    for split, frame in frames.items():
        for column in (texts.column, label, *([group] if group is not None else [])):
            if column not in frame.columns:
                raise DataError(
                    f"{path} has no column {column!r} in its {split} rows (--text, --label, --group). Its columns: {', '.join(frame.columns)}."
                )
        if gone := frame[texts.column].null_count() + frame[label].null_count():
            raise DataError(f"{gone} of the {split} rows of {path} lack a text or a class; leave these rows out.")
    names = sorted({_text(value) for frame in frames.values() for value in frame[label].to_list()})
    parts = {
        split: ([str(value) for value in frame[texts.column].to_list()], _labels(frame[label].to_list(), names))
        for split, frame in frames.items()
    }
    groups, own_notes = _groups_of(path, frames["train"], group), list[str]()
    if "test" not in parts:
        x, y = parts["train"]
        of_train, of_test = _split(y.numpy(), seed, groups)
        parts |= {"train": ([x[i] for i in of_train], y[of_train]), "test": ([x[i] for i in of_test], y[of_test])}
        groups = groups and [groups[i] for i in of_train.tolist()]
        own_notes = splitting.note(len(of_test), len(y), TEST, "test") if groups else []
    notes = [f"texts are in {texts.column!r}; the class is {label!r}", *_shared_groups(group, frames), *own_notes]
    return Source(
        (parts["train"], parts.get("validation"), parts["test"]),
        names,
        form=texts.form,
        notes=tuple(notes),
        groups=groups,
    )


def _frames(kind: str, path: Path) -> dict[str, Any]:
    import polars

    def read(file: Path) -> Any:
        try:
            found = polars.read_csv(file, infer_schema_length=None) if kind == "csv" else polars.read_parquet(file)
            return found.with_columns(polars.selectors.decimal().cast(polars.Float64)).with_columns(
                polars.selectors.float().fill_nan(None)
            )
        except (OSError, polars.exceptions.PolarsError) as error:
            raise DataError(f"{file} cannot be read as {kind}: {str(error).splitlines()[0]}") from None

    if not path.is_dir():
        return {"train": read(path)}
    files = {split: path / f"{split}.{kind}" for split in SPLITS}
    if not files["train"].exists() or not files["test"].exists():
        raise DataError(f"{path} must hold train.{kind} and test.{kind}, and may hold validation.{kind}.")
    return {split: read(file) for split, file in files.items() if file.exists()}


def _field(path: Path, column: str, frames: Sequence[Any]) -> TableField:
    import polars

    kind = frames[0][column].dtype
    if kind.is_numeric():
        return TableField(name=column)
    if kind not in (polars.String, polars.Boolean, polars.Categorical, polars.Null):
        raise DataError(
            f"{path}: the column {column!r} holds {kind}; make it a number or a text, or leave it out with --drop."
        )
    texts = [value for frame in frames for value in frame[column].to_list() if isinstance(value, str)]
    strange = next((text for text in texts if not _is_number(text)), None)
    if texts and strange is not None and 2 * sum(map(_is_number, texts)) > len(texts):
        raise DataError(
            f"{path}: the column {column!r} seems to hold numbers, but also the text {strange[:40]!r}. Leave missing numbers empty, or drop the column."
        )
    values = sorted({"" if value is None else _text(value) for frame in frames for value in frame[column].to_list()})
    if len(values) > CATEGORIES:
        raise DataError(
            f"{path}: the column {column!r} has {len(values)} different texts, more than the {CATEGORIES} of a category. If it is a name or a "
            "number of the row, leave it out: --drop."
        )
    return TableField(name=column, categories=values)


def _row(row: dict[str, Any], described: Sequence[TableField]) -> dict[str, Any]:
    texts = {field.name for field in described if field.categories is not None}
    return {name: _text(value) if name in texts and value is not None else value for name, value in row.items()}


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # 1.0 and 1 are one class
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _labels(values: Sequence[Any], names: Sequence[str]) -> torch.Tensor:
    number = {name: index for index, name in enumerate(names)}
    return torch.tensor([number[_text(value)] for value in values])


def _split(
    labels: np.ndarray[Any, Any], seed: int, groups: Sequence[Any] | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows for training and for the test, in the same shares of each class."""
    if groups is not None:
        return splitting.by_group(labels, groups, TEST, seed)
    return splitting.stratified(labels, TEST, seed)
