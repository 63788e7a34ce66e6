"""launcher=local: one rank, which is this command's own child."""

from __future__ import annotations

from shardwright.launchers.kinds.launcher import Launcher
from shardwright.train.config import LocalLauncher


class Local(Launcher[LocalLauncher]):
    """One process; what it writes about its failure is the rank's own."""

    has_pages = False
