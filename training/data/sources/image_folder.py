"""Data sets as folders of images, one folder per class: layouts, files that are read, and files that are ignored.

    PATH/train, PATH/val, PATH/test    with one folder per class. Without `test`, `val` is the test split, and validation
                                       is set aside from the train split. The names training, valid, validation and
                                       testing are accepted too, in upper or lower case
    PATH/CLASS/…                       without PATH/train: a fifth of the images is the test split

Files and their order are those of torchvision's ImageFolder, without hidden files and without __MACOSX.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from models_store.errors import DecodeError
from models_store.inputs import decoding
from models_store.manifest import InputSpec
from training.data import splitting
from training.data.augment import Augment
from training.data.classes import listed
from training.data.forms import ImageForm
from training.data.sources import Source
from training.errors import DataError

SIZE = 224
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPELLINGS = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing"),
}  # fmt: skip


class ImageFiles(Dataset[Any]):
    """Image files, decoded on access to (3, size, size) in [0, 1] by the code that the service uses."""

    def __init__(self, files: Sequence[str], targets: Sequence[int], size: int):
        self.files, self.targets = list(files), list(targets)
        self._spec = InputSpec(shape=(3, size, size), resize="crop")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        """Image and label.

        Raises:
            DataError: the file cannot be read or decoded; the message names it.
        """
        file = self.files[row]
        try:
            image = decoding.open_image(Path(file).read_bytes())
            return torch.from_numpy(decoding.to_array(image, self._spec)), self.targets[row]
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.") from None
        except DecodeError as error:
            raise DataError(f"{file}: {error} Repair or remove it.") from None


def source(path: str, size: int, group: str | None = None) -> Source:
    """The splits of a folder of images.

    Args:
        path: the folder.
        size: side length of the images in pixels. The shorter side is scaled to it, and the centre is cropped.
        group: regular expression; what it finds in the path of an image below PATH is the image's group (its first bracket, if it has one).

    Raises:
        DataError: not a folder, or without classes; broken links; splits with different classes.
    """
    root = _root(path)
    search = _Search(root)
    splits = _splits(root, search)
    if splits is None:
        classes = search.classes(root)
        whole = _files(classes, sorted(classes), size)
        groups = _groups(whole, root, group)
        if groups is None:
            order = np.random.default_rng(0).permutation(len(whole)).tolist()
            held_out = len(order) // 5
            stay, aside = order[held_out:], order[:held_out]
        else:
            stay, aside = (rows.tolist() for rows in splitting.by_group(np.array(whole.targets), groups, 0.2, 0))
            groups = [groups[i] for i in stay]
        parts = Subset(whole, stay), None, Subset(whole, aside)
        names = sorted(classes)
    else:
        if len(splits) == 1:
            raise DataError(
                f"imagefolder:{path} has {splits['train'].name}/ but neither test/ nor val/: nothing to report on. If "
                f"{splits['train'].name} is a class, rename the folder."
            )
        found = {name: search.classes(folder) for name, folder in splits.items()}
        names = sorted(found["train"])
        for name, classes in found.items():
            if foreign := sorted(set(classes) - set(names)):
                raise DataError(
                    f"imagefolder:{path}: the splits have different class folders: {listed(foreign)} in {splits[name].name}/ only, without an "
                    f"image in {splits['train'].name}/. Are the names spelled alike?"
                )
            if absent := sorted(set(names) - set(classes)):
                search.notes.append(f"{splits[name].name}/ has no image of {listed(absent)}")
        every = {name: _files(classes, names, size) for name, classes in found.items()}
        validation, test = (every.get("val"), every["test"]) if "test" in every else (None, every["val"])
        parts = every["train"], validation, test
        groups = _groups(every["train"], root, group)
    return Source(
        parts, names, augment=Augment(crop=size // 8, flip=True), form=ImageForm("crop"), notes=search.said(f"imagefolder:{path}"), groups=groups,
    )  # fmt: skip


def foreign(path: str, size: int) -> tuple[ImageFiles, tuple[str, ...]]:
    """Images whose classes do not matter, and notes for the log.

    These are the images of the test split (else validation, else train), or without splits, all images below the
    folder. Their order is random, but always the same.

    Raises:
        DataError: not a folder, or without images; broken links.
    """
    root = _root(path)
    search = _Search(root)
    splits = _splits(root, search)
    if splits is not None:
        chosen = splits.get("test") or splits.get("val") or splits["train"]
        files = search.images(chosen)
        search.notes.append(f"of the splits, only {chosen.name}/ is read")
    else:
        files = search.images(root)
    if not files:
        raise DataError(f"imagefolder:{path} holds no images ({', '.join(EXTENSIONS)}).")
    order = np.random.default_rng(0).permutation(len(files))
    return ImageFiles([files[i] for i in order], [0] * len(files), size), search.said(f"imagefolder:{path}")


def _root(path: str) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"imagefolder:{path} is not a folder.")
    return root


def _files(classes: dict[str, list[str]], names: Sequence[str], size: int) -> ImageFiles:
    pairs = [(file, label) for label, name in enumerate(names) for file in classes.get(name, ())]
    return ImageFiles([file for file, _ in pairs], [label for _, label in pairs], size)


def _groups(files: ImageFiles, root: Path, pattern: str | None) -> list[str] | None:
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--group {pattern!r} is not a regular expression: {error}.") from None
    found: list[str] = []
    for file in files.files:
        name = os.path.relpath(file, root)
        if (match := expression.search(name)) is None:
            raise DataError(f"--group {pattern!r} finds nothing in {name!r}; it must find the group of every image.")
        found.append(match.group(1 if expression.groups else 0) or "")
    return found


def _splits(root: Path, search: _Search) -> dict[str, Path] | None:
    """Folders of the splits by name (train, val, test); None if the folders are classes."""
    folders = [Path(entry.path) for entry in search.entries(str(root)) if entry.is_dir()]
    found: dict[str, Path] = {}
    for name, spellings in SPELLINGS.items():
        alike = [folder for folder in folders if folder.name.lower() in spellings]
        if len(alike) > 1:
            raise DataError(f"{root} has several folders for one split: {', '.join(f.name for f in alike)}. Keep one.")
        if alike:
            found[name] = alike[0]
    if "train" not in found:
        if found and len(found) == len(folders):
            raise DataError(f"{root} has {' and '.join(f'{f.name}/' for f in found.values())}, but no train/.")
        found = {}
    # "training" may be the name of a class, unless there is the folder of a second split.
    if found and (len(found) > 1 or found["train"].name.lower() == "train"):
        for folder in folders:
            if folder not in found.values():
                search.leave_out("folders that are not a split", folder)
        return found
    search.forget()  # the same entries are read again, as those of classes
    return None


@dataclass
class _Search:
    """Searches for images, and counts what it leaves out."""

    root: Path
    ignored: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Entries of a folder, sorted by name, without hidden files and __MACOSX.

        Raises:
            DataError: the folder cannot be read, or has a broken link.
        """
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}.") from None
        kept: list[os.DirEntry[str]] = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                self.leave_out("hidden files or folders", entry.path)
            elif entry.is_symlink() and not Path(entry.path).exists():
                raise DataError(
                    f"{entry.path} is a link to {Path(entry.path).readlink()}, which does not exist. Is a disk not mounted? Restore the file or "
                    "remove the link."
                )
            else:
                kept.append(entry)
        return kept

    def images(self, folder: Path | str) -> list[str]:
        """Image files (by their suffix) in the folder and all its subfolders."""
        found: dict[str, list[str]] = {}
        self._collect(str(folder), (), found)
        return [file for folder in sorted(found) for file in found[folder]]

    def classes(self, folder: Path) -> dict[str, list[str]]:
        """The images of each class folder that has any.

        Raises:
            DataError: no class folder has images.
        """
        found: dict[str, list[str]] = {}
        for entry in self.entries(str(folder)):
            if not entry.is_dir():
                self.leave_out("files outside any class folder", entry.path)
            elif files := self.images(entry.path):
                found[entry.name] = files
            else:
                self.leave_out("class folders without images", entry.path)
        if not found:
            raise DataError(
                f"{folder} has no class folders with images in them; one folder for each class is needed."
                f"{''.join(f' {line}' for line in self.said('There are'))}"
            )
        return found

    def leave_out(self, what: str, path: Path | str) -> None:
        """Count something that is not read."""
        self.ignored[what] += 1
        self.first.setdefault(what, os.path.relpath(path, self.root))

    def forget(self) -> None:
        """Reset the counts."""
        self.ignored.clear()
        self.first.clear()

    def said(self, whose: str) -> tuple[str, ...]:
        """One line for the log about what was left out; empty if nothing was."""
        lines = [f"{count} {what} (as {self.first[what]})" for what, count in sorted(self.ignored.items())]
        if lines:
            lines = [f"ignored: {', '.join(lines)}"]
        return (f"{whose}: {'; '.join([*lines, *self.notes])}.",) if lines or self.notes else ()

    def _collect(self, folder: str, above: tuple[str, ...], found: dict[str, list[str]]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            raise DataError(f"{folder} is a link to a folder that contains it. Remove the link.")
        for entry in self.entries(folder):
            if entry.is_dir():
                self._collect(entry.path, (*above, real), found)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.setdefault(folder, []).append(entry.path)
            else:
                self.leave_out("files of other kinds", entry.path)
