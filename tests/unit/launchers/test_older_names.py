"""What job scripts of older runs say, and people in a checkout, is still understood there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.launchers.fakes import ROOT
from tests.unit.launchers.run_directories import a_run

# As a script has set it, which may start anywhere.
OF_A_SCRIPT = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
OLDER = ("train", "launchers")

# Runs a module as -m does; fails where there is a second copy of what a module defines.
AS_A_PROGRAM = f"""
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
code = None
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
twice = [
    f"{{name}}.{{key}}"
    for name, module in list(sys.modules.items())
    if name.partition(".")[0] in {OLDER} and name != "__main__"
    for key, value in vars(module).items()
    if getattr(value, "__module__", None) == name
]
assert not twice, twice
sys.exit(code)
"""


def run(
    cwd: Path, environment: Mapping[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("module", "arguments", "code", "said"),
    [
        ("train", ("RUN_DIR/none",), 2, "config.yaml"),
        ("train.data", ("RUN_DIR/none",), 2, "config.yaml"),
        ("launchers", ("status", "RUN_DIR"), 0, "run"),
        ("launchers.relay", (sys.executable, "-c", "print('relayed')"), 0, "relayed"),
        ("launchers.requeue", ("RUN_DIR", "--restarts", "0"), 0, ""),
        ("launchers.job_end", ("RUN_DIR", "1"), 1, "ended with exit code 1"),
    ],
)
def test_a_line_of_an_older_script_runs(
    module: str, arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    for name in (*OLDER, "conf", "slurm", "shardwright"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user has one as well')")
    for place, environment, start in (
        (tmp_path, OF_A_SCRIPT, ("-c", AS_A_PROGRAM)),
        (ROOT, {}, ("-m",)),
    ):
        run_dir = str(a_run(tmp_path / f"run{start[0]}"))
        given = [argument.replace("RUN_DIR", run_dir) for argument in arguments]
        ended = run(place, environment, *start, module, *given)
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert said in ended.stdout + ended.stderr


def test_a_copy_of_a_checkout_that_has_lost_its_links_is_found_alike(tmp_path: Path) -> None:
    """Some file systems, archives and programs that copy have no links."""
    for name in (*OLDER, "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "shardwright").mkdir()
    for path in (ROOT / "shardwright").glob("*.py"):
        shutil.copy(path, tmp_path / "shardwright")
    (tmp_path / "shardwright" / "conf").write_text("../conf")  # as git has it where there are none
    there = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    code = "import shardwright.train.config as c; print(c.__name__, c.__file__)"
    ended = run(tmp_path, there, "-c", code)
    name = "shardwright.train.config"
    assert ended.stdout == f"{name} {tmp_path}/train/config/__init__.py\n", ended.stderr
    given = ("train", "--dry-run", "experiment=demo", "launcher.device=cpu", "run_dir=run")
    ended = run(tmp_path, there, "-m", "shardwright", *given)
    assert ended.returncode == 0, ended.stderr
    assert f"PYTHONPATH={tmp_path}" in ended.stdout
