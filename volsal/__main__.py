"""``python -m volsal``."""

from volsal.cli import main

main()
