"""An explanation as a notebook shows it: a piece of HTML that holds its pictures and needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from markupsafe import Markup

from volsal.report.markup import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# About 900 pixels wide: as wide as a notebook's cell, and some 100 kB.
_DPI = 84


@dataclass(frozen=True)
class Shown:
    """One map of a piece: its name, what is to be said of it, and its picture; None where only the words are shown."""

    name: str
    words: str
    figure: Figure | None

    @property
    def picture(self) -> str:
        """The figure as an address that holds it."""
        file = BytesIO()
        if self.figure is not None:
            self.figure.savefig(file, format="png", dpi=_DPI, facecolor=self.figure.get_facecolor())
        return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def piece(title: str, said: str, maps: Sequence[Shown], notes: Sequence[str]) -> Markup:
    """HTML without scripts, links or style of its own; whatever the texts hold is shown as text.

    Parameters
    ----------
    title, said : the case, and what the model said of it
    maps : the first is shown at once, the others when they are opened
    notes : on the result
    """
    return render("notebook.html", title=title, said=said, maps=maps, notes=notes)
