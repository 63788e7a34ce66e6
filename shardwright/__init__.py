"""Shardwright, by the one name that it has where it is installed: train, launchers, conf, slurm.

A wheel has these folders in here. A checkout has them at its top, and links to them in here.
"""

from pathlib import Path

# A copy of a checkout may have lost its links, as where a file system knows none.
if not Path(__path__[0], "train", "__init__.py").is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))
