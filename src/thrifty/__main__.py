"""`python -m thrifty`."""

from thrifty.cli import main

main()
