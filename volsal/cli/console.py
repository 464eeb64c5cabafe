"""The program itself, what it prints on, and how errors are told."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

# A mistake in the config fails every scan alike: it is told this often, and then counted.
REPEATS = 3
SOME_FAILED, NO_SENSE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="volsal",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "See where in a scan a 3D model found its evidence.\n\n"
        "volsal takes a trained 3D network and scans (NIfTI, DICOM, NRRD, MetaImage), asks the network what made it "
        "say what it says, and writes the answer as overlay volumes on each scan's own voxels: open them over the scan "
        "in napari, 3D Slicer, ITK-SNAP or FSLeyes.\n\n"
        "New here? Run [bold]volsal demo[/bold]: it needs no data of yours."
    ),
)
# Where no one watches, a line may be as long as it needs to be: names and numbers are not cut.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: object) -> str:
    """Text that cannot write anything but itself to a terminal: names of files may hold control characters."""
    safe = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in safe)


def cell(text: object) -> Text:
    """A table cell that shows ``text`` and reads no markup in it."""
    return Text(printable(text).replace("\n", "\\n"))


def say(text: object, console: Console = out, style: str | None = None) -> None:
    """Print without reading markup into what came from files."""
    console.print(printable(text), markup=False, style=style)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Errors in one line, the traceback behind --debug, and the right exit status."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("interrupted; what is done is kept", err)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # noqa: BLE001 - the outermost border: a person is on the other side
            _fail(error)

    return wrapped


def _fail(error: Exception) -> NoReturn:
    from volsal.config import ConfigError
    from volsal.errors import VolsalError
    from volsal.preprocess import PreprocessError
    from volsal.scans import MissingScanError, ScanError

    if is_debug():
        say(traceback.format_exc(), err)
    if isinstance(error, VolsalError):
        # Only a config can be wrong in several lines; a line break elsewhere comes from a file's name.
        say(f"volsal: {error if isinstance(error, ConfigError) else cell(error)}", err)
        of_scan = isinstance(error, (ScanError, PreprocessError)) and not isinstance(error, MissingScanError)
        raise typer.Exit(SOME_FAILED if of_scan else NO_SENSE)
    say(f"volsal: unexpected {type(error).__name__}: {error} (run again with --debug and report what it prints)", err)
    raise typer.Exit(SOME_FAILED)


def is_debug() -> bool:
    """Whether tracebacks are wanted."""
    return bool(os.environ.get("VOLSAL_DEBUG"))


def _version(wanted: bool) -> None:
    if wanted:
        from volsal import __version__

        say(f"volsal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from (allowed anywhere).")] = False,
) -> None:
    pass


def duration(seconds: float) -> str:
    """Seconds in words that a person plans by."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
