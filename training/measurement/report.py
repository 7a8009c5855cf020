"""The result of a measurement: its numbers, which are also the content of the JSON file, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(dict[str, Any]):
    """The numbers of a measurement. `figures` holds matplotlib figures by file name, for use in a notebook."""

    def __init__(self, numbers: dict[str, Any]):
        """Make a report without figures."""
        super().__init__(numbers)
        self.figures: dict[str, Figure] = {}

    def save_figures(self, folder: Path) -> None:
        """Write each figure into `folder` as PNG."""
        for name, figure in self.figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
