"""A process that owns the directory of a sweep, until it is killed."""

from __future__ import annotations

CLAIMS = """
import sys
from pathlib import Path
from shardwright.launchers.sweep import directory
with directory.claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""
