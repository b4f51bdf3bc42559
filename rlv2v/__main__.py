"""`python -m rlv2v`: the console script `rlv2v`."""

from rlv2v.cli import main

main()
