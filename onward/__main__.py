"""``python -m onward``: the command line, also where its script is not on the path."""

from .command import main

main()
