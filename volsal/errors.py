"""The one ancestor of every error that volsal raises on purpose.

Such an error is addressed to a person: one line that names the file or layer, what was found, what was expected and
what to do next.  Anything else that escapes is a bug in volsal or in the user's model, and is shown with its type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VolsalError(Exception):
    """Something that the person who called volsal can understand and mend."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for a misspelt ``name``: "; did you mean 'a' or 'b'?", or the known names where none is near."""
    choices = [choice for choice in known if choice]
    near = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(choice) for choice in near) + "?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"; known: {shown}" if shown else ""
