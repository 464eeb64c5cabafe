"""From data to HTML: templates that escape whatever they are given, and a policy that lets only volsal's script run."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from volsal.display import colours

# Controls, characters that turn the direction of the text around them, and halves of characters: what they do to a page
# (or a person who reads it) is not what their sender should decide.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_HARMLESS = {"\n", "\t", "\u200c", "\u200d", "\u00ad"}  # line ends, joiners that some scripts need, the soft hyphen
# A path that begins at the root, up to its last separator.  An apostrophe within a word is O'Brien's and ends no quote.
_FOLDERS = re.compile(r"(?<![^\s'\"(])(?:[A-Za-z]:[\\/]|/)(?:[^\s/\\:'\"](?:[^/\\:'\"\n]|(?<=\w)'(?=\w))*[/\\])+")


def readable(text: str) -> str:
    """``text`` as a page may hold it: its invisible characters written out, files named without their folders.

    A report travels, and folders may bear a patient's name.

    >>> readable("/data/Jane Roe/scan.nii: the file is empty")
    '…/scan.nii: the file is empty'
    """
    text = _FOLDERS.sub("…/", text)
    if text.isprintable():
        return text
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _UNSEEN and char not in _HARMLESS else char
        for char in text
    )


def data_block(content: Any) -> Markup:
    """``content`` as JSON that may stand in a script element: nothing in it can end the element or begin another."""
    text = json.dumps(_readable_all(content), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _readable_all(content: Any) -> Any:
    if isinstance(content, str):
        return readable(content)
    if isinstance(content, Mapping):
        return {readable(str(key)): _readable_all(value) for key, value in content.items()}
    return [_readable_all(value) for value in content] if isinstance(content, Sequence) else content


@cache
def environment() -> Environment:
    """The templates.  Every value is escaped, an unknown one is an error, and invisible characters are written out."""
    made = Environment(
        loader=PackageLoader("volsal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else readable(str(value)),
    )
    made.filters |= {"data": data_block, "n4": _number, "mm": _mm, "size": _size, "plural": _plural, "pretty": _pretty}
    return made


def render(template: str, **values: Any) -> Markup:
    """The template of that name with ``values`` in it."""
    return Markup(environment().get_template(template).render(values))


def whole_page(template: str, **values: Any) -> str:
    """A page that needs nothing beside itself: volsal's style and script are in it, and no other may run.

    Pictures may come from the page's own folder; nothing is ever asked of a network.
    """
    style, script = _style(), _resource("report.js")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src 'self' file: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return str(render(template, policy=policy, style=Markup(style), script=Markup(script), **values))


@cache
def _resource(name: str) -> str:
    return files("volsal.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    """The style sheet with the two colour maps in it, as they look over black."""
    ramps = "".join(f"--{name}: {_gradient(signed)}; " for name, signed in (("plain", False), ("signed", True)))
    return f":root {{ {ramps}}}\n{_resource('report.css')}"


def _gradient(signed: bool) -> str:
    stops = ["rgb({:.0f} {:.0f} {:.0f})".format(*(255 * point[3] * point[:3])) for point in colours(signed)]
    return f"linear-gradient(to right, {', '.join(stops)})"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _mm(values: Sequence[float], digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}".replace("-", "−") for value in values)


def _size(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.3g}" for value in values)


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
