"""`python -m shardwright`: the `shardwright` command, wherever the package is found."""

from __future__ import annotations

import sys

from shardwright.launchers.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
