"""What a measurement returns: its numbers, as the JSON file beside the figures holds them, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(dict[str, Any]):
    """The numbers of a measurement. `figures` holds matplotlib figures by the name of their file, for use in a notebook."""

    def __init__(self, numbers: dict[str, Any]):
        """A report without figures."""
        super().__init__(numbers)
        self.figures: dict[str, Figure] = {}

    def save_figures(self, folder: Path) -> None:
        """Write each figure into `folder` as PNG."""
        for name, figure in self.figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
