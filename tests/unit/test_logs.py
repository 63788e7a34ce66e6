"""What of libraries' messages a rank's log keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from shardwright.train.config.launcher import LocalLauncher, TorchrunLauncher

SAID = """
import logging, os, sys
from shardwright.train.process import logs
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s")
logs.keep_from(sys.argv[1])
logging.getLogger("torch.some").debug("")
logging.getLogger("torch.some").warning("")
from transformers.utils import logging as of_transformers
print(of_transformers.get_verbosity())
"""


def said(level: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", SAID, level]
    return subprocess.check_output(command, text=True, env=environment).splitlines()


def test_a_level_holds_for_all_libraries_unless_the_user_says_otherwise_of_transformers() -> None:
    assert said("debug") == ["DEBUG torch.some", "WARNING torch.some", "10"]
    assert said("error", TRANSFORMERS_VERBOSITY="info") == ["20"]


def test_other_ranks_have_the_level_of_the_first_or_one_of_their_own() -> None:
    plain = TorchrunLauncher(kind="torchrun", nproc_per_node=2)
    assert (plain.log_level_of(0), plain.log_level_of(1)) == (None, None)
    same = TorchrunLauncher(kind="torchrun", log_level="debug")
    assert (same.log_level_of(0), same.log_level_of(3)) == ("debug", "debug")
    quiet = TorchrunLauncher(kind="torchrun", log_level="info", log_level_other_ranks="error")
    assert (quiet.log_level_of(0), quiet.log_level_of(3)) == ("info", "error")


def test_another_level_is_an_error() -> None:
    with pytest.raises(ValidationError, match="'debug', 'info', 'warning' or 'error'"):
        LocalLauncher(kind="local", log_level="trace")  # type: ignore[arg-type]
