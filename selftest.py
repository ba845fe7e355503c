"""`python selftest.py` is `nds selftest`: every stage once on tiny random models, without a GPU or a network."""

import sys

from nemotron_dspark.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "selftest")
    main()
