"""``python -m scalpel``: the command line, as ``torchrun … -m scalpel`` needs it."""

from .cli.commands import main

main()
