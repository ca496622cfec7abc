"""`python -m nas`: the command line."""

from nas.cli import main

main()
