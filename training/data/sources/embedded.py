"""Small data sets of tables, signals and texts that packages ship. sources.py has the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from training.data import sources
from training.data.forms import FeatureForm, TokenForm, texts
from training.data.sources import Source
from training.errors import DataError

TEST = 0.2  # share of the rows
LANGUAGES = ("de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "tr")  # all in Latin script
LONGEST = 32  # bytes of a text; longer ones are left out
BYTES = 257  # ids: byte + 1, and the padding


def _table(name: str) -> Source:
    from sklearn import datasets

    bunch: Any = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(bunch.data.astype(np.float32)), torch.from_numpy(bunch.target.astype(np.int64))
    train, test = _halves(len(y))
    classes = [str(one) for one in bunch.target_names]
    return Source(((x[train], y[train]), None, (x[test], y[test])), classes, form=FeatureForm())


def digit_rows() -> Source:
    """The digits as signals: (8, 8), the steps from top to bottom, of 8 values in [0, 1]."""
    digits = sources.digits()
    parts = [part and (part[0][:, 0], part[1]) for part in digits.parts]
    return Source((parts[0], parts[1], parts[2]), digits.classes, form=FeatureForm(low=0, high=1))


def languages() -> Source:
    """Names of countries, languages, months and days in ten languages, as UTF-8 bytes (Unicode CLDR, from Babel).

    The class is the language. Names that are the same in two languages are left out.
    """
    try:
        from babel import Locale
    except ImportError:
        raise DataError("The data set languages needs the package babel: pip install 'modepath[training]'.") from None
    found: dict[str, set[int]] = {}
    for label, code in enumerate(LANGUAGES):
        locale = Locale(code)
        calendars = [*locale.months["format"]["wide"].values(), *locale.days["format"]["wide"].values()]
        for name in {*locale.territories.values(), *locale.languages.values(), *calendars}:
            if 2 <= len(name.encode()) <= LONGEST:
                found.setdefault(name, set()).add(label)
    names = sorted(name for name, labels in found.items() if len(labels) == 1)
    ids = torch.zeros(len(names), LONGEST, dtype=torch.int64)
    for row, name in zip(ids, names, strict=True):
        content = torch.tensor(list(name.encode())) + 1
        row[: len(content)] = content
    y = torch.tensor([min(found[name]) for name in names])
    train, test = _halves(len(y))
    return Source(
        ((ids[train], y[train]), None, (ids[test], y[test])),
        list(LANGUAGES),
        form=TokenForm(BYTES, LONGEST, texts.of_bytes()),
    )


def _halves(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.from_numpy(np.random.default_rng(0).permutation(rows))
    size = round(TEST * rows)
    return order[size:], order[:size]


BUILT_IN: dict[str, Callable[[], Source]] = {
    "breast-cancer": lambda: _table("breast_cancer"),
    "wine": lambda: _table("wine"),
    "digit-rows": digit_rows,
    "languages": languages,
}
