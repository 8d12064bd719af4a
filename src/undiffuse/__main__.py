"""``python -m undiffuse`` is the command line."""

from undiffuse.cli import run

run()
