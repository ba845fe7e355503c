"""`python -m nemotron_dspark` is `nds`."""

from nemotron_dspark.cli import main

main()
