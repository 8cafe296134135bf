"""``python -m bench`` is the command ``cyclebench``."""

from bench.cli import main

main()
