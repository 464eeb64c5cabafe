"""The command line: words to calls, results to exit codes.  No computation lives here.

Exit status: 0 all done; 1 some scans failed, each named on stderr; 2 the command itself made no sense.
"""

from __future__ import annotations

import os
import sys

from volsal.cli.console import INTERRUPTED, app

# Each puts its commands into the app, in the order in which help lists them.
# isort: off
from volsal.cli import explaining as explaining
from volsal.cli import runs as runs
from volsal.cli import auditing as auditing
from volsal.cli import checks as checks
from volsal.cli import showing as showing
# isort: on


def main() -> None:
    """The ``volsal`` command."""
    if "--debug" in sys.argv:  # allowed before and after the command's name
        sys.argv.remove("--debug")
        os.environ["VOLSAL_DEBUG"] = "1"
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
