"""What is printed or documented to be run works beside files of the names of our modules."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from docs.generate import BEGIN, DOCS, END
from shardwright.launchers import messages
from shardwright.launchers.__main__ import COMMANDS, USAGE
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.slurm import submit
from shardwright.train import program
from shardwright.train.errors import BAD_INPUT
from shardwright.train.program import PACKAGES
from shardwright.train.run_directory.stop_note import Stopped
from tests.unit.launchers.configs import resolved
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

SCRIPT = Path(sysconfig.get_path("scripts")) / "shardwright"
RUN_DIR = Path("/runs/a b")
STOPPED = Stopped(step=7, samples=56, reason="a test", time=0.0, checkpoint=None, progress_steps=7)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A directory of a user who has modules of our names."""
    for name in ("train", "launchers", "conf", "slurm", "shardwright"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user has run {name}.py')\n")
    return tmp_path


def help_of(lines: list[str], cwd: Path, environment: Mapping[str, str]) -> None:
    """Run each command with --help, all at once."""
    running = [
        subprocess.Popen(
            ["bash", "-c", f"{line} --help"],
            cwd=cwd,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in lines
    ]
    for line, process in zip(lines, running, strict=True):
        out, _ = process.communicate(timeout=120)
        assert process.returncode in (0, BAD_INPUT), (line, out)
        assert "the user has run" not in out, line
        assert "shardwright" in out, line


def shell(**changes: str) -> dict[str, str]:
    """The environment of a shell in which the package is installed, and no path leads to it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return {**plain, **changes}


def test_every_command_runs_there(beside: Path) -> None:
    assert SCRIPT.exists()
    help_of([shlex.join([str(SCRIPT), name]) for name in COMMANDS], beside, shell())


def printed() -> list[str]:
    """Return all that the launcher prints to be run."""
    config = resolved("torchrun", nodes=2, nproc_per_node=1, head_address="node1")
    config = config.model_copy(update={"run_dir": str(RUN_DIR)})
    texts = [
        launcher_of(config).other_nodes(),
        messages.finish(RUN_DIR),
        messages.stopped(STOPPED, RUN_DIR, None),
        messages.stopped_early(RUN_DIR, 15),
        messages.preparation_failed(RUN_DIR, 1),
        messages.failure(1, [], RUN_DIR, 15, config=config),
        submit._submitted(RUN_DIR, "7", None),
    ]
    lines = re.findall(
        r"(?:env \S+ \S+ \S+ -m shardwright|[^\s`]*shardwright) .*'", "\n".join(texts)
    )
    return [line.removesuffix(" --prompt '...'") for line in lines]


@pytest.mark.parametrize("where", ["in the path", "elsewhere", "not installed"])
def test_every_command_that_is_printed_runs_there(
    where: str, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where != "in the path":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if where == "not installed":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(beside))
    lines = printed()
    found = [re.search(r"shardwright (\w+) ", line) for line in lines]
    assert [match and match[1] for match in found] == [
        *("join", "sample", *["resume"] * 4, "logs", "status", "cancel")
    ]
    begins = {
        "in the path": "shardwright ",
        "elsewhere": f"{SCRIPT} ",
        "not installed": f"env PYTHONPATH={ROOT} PYTHONSAFEPATH=1 {sys.executable} -m shardwright ",
    }[where]
    assert all(line.startswith(begins) for line in lines), lines
    help_of(sorted(set(lines)), beside, shell(PATH=os.environ["PATH"]))


def test_another_program_of_that_name_is_not_meant(tmp_path: Path) -> None:
    other = tmp_path / "shardwright"
    other.touch()
    assert program.program(SCRIPT, str(other)) == str(SCRIPT)
    link = tmp_path / "link"
    link.symlink_to(SCRIPT)
    assert program.program(SCRIPT, str(link)) == "shardwright"


def test_what_a_dry_run_prints_starts_the_ranks_from_there(
    beside: Path, shardwright: Shardwright
) -> None:
    """As far as a run directory that is not there."""
    outcome = shardwright(
        *("train", "--dry-run", "launcher=local", "strategy=single", "launcher.device=cpu"),
        f"run_dir={beside}/run",
    )
    assert outcome.code == 0, outcome.err
    text = outcome.out[outcome.out.index("# environment") :]
    ended = subprocess.run(
        ["bash", "-c", text], cwd=beside, env=shell(), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert f"{beside}/run" in ended.stderr
    assert "config.yaml" in ended.stderr


def test_no_message_has_a_module_run_that_could_be_the_users() -> None:
    """None with arguments, but for the titles of modules."""
    for path in sorted([*(ROOT / "launchers").glob("*.py"), *(ROOT / "train").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        titles = {ast.get_docstring(tree, clean=False)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        for text in texts:
            if isinstance(text, str) and text not in titles:
                assert not re.search(r"(-m|torchrun .*) (train|launchers)[\w.]* ", text), path


DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted(DOCS.glob("*.md"))))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_document_has_a_module_run_that_could_be_the_users(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(f"{BEGIN}.*{END}", "", text, flags=re.DOTALL)  # what modules say of themselves
    assert not re.search(r"-m (train|launchers|conf|slurm)\b", text)
    for command in re.findall(r"(?:^|[`(])shardwright (\w+)", text, re.MULTILINE):
        assert command in COMMANDS


def test_every_command_is_in_the_usage() -> None:
    for command in COMMANDS:
        assert f"shardwright {command} " in USAGE


@pytest.mark.parametrize("user", [{}, {"PYTHONSAFEPATH": "", "PYTHONPATH": "."}])
def test_no_setting_of_the_user_has_ranks_import_the_users_modules(user: dict[str, str]) -> None:
    made: list[dict[str, Any]] = [
        rank_environment(resolved("local"), Machine(), user),
        rank_environment(resolved("slurm"), Machine(), user),
    ]
    for environment in made:
        assert environment["PYTHONSAFEPATH"] == "1"
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(PACKAGES)
