"""Every launcher is one module behind one protocol; nothing else tells kinds apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from shardwright.launchers import dry_run, preflight
from shardwright.launchers.commands.join import node_rank_of
from shardwright.launchers.composition.compose import CONF
from shardwright.launchers.kinds.launcher import UNKNOWN, Launcher, Task
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import LAUNCHERS, launcher_of
from shardwright.train.config import LauncherConfig, RunConfig, SlurmLauncher
from shardwright.train.config.launcher import SeveralRanks
from shardwright.train.errors import UserError
from tests.unit.launchers.configs import config, resolved

ROOT = Path(__file__).resolve().parents[3]
SECTIONS = get_args(get_args(LauncherConfig)[0])


def test_every_section_has_a_launcher_and_an_option() -> None:
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in SECTIONS}
    assert kinds == LAUNCHERS.keys() == {path.stem for path in (CONF / "launcher").glob("*.yaml")}


TELLS_APART = re.compile(
    r"launcher\.kind (?:[=!]=|(?:not )?in)|launcher\[.kind.\]"
    r"|isinstance\([^)]*(?:Local|Torchrun|Deepspeed|Accelerate|Slurm)Launcher"
    r"|case (?:Local|Torchrun|Deepspeed|Accelerate|Slurm)Launcher"
)
OF_SLURM = ("launchers/slurm/", "launchers/job_end.py")
"""What is never called for another kind, and says so to the type checker."""


def test_nothing_tells_kinds_of_launchers_apart() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("train", "launchers")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if TELLS_APART.search(line)
        and not (
            str(path.relative_to(ROOT)).startswith(OF_SLURM)
            and re.search(r"assert isinstance\([\w.]+, SlurmLauncher\)", line)
        )
    ]
    assert not found, "\n".join(found)


class JsrunLauncher(SeveralRanks):
    """A launcher that nothing but its own module and the registry know."""

    kind: Literal["jsrun"]


class Jsrun(Launcher[Any]):
    joins = True

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        return ["jsrun", f"--node={node_rank}", f"--port={machine.free_port}", *task.words]

    def variables(self) -> Mapping[str, str]:
        return {"JSRUN_GRACE": f"{self.section.grace_seconds:g}"}

    def files(
        self, environment: Mapping[str, str], machine: Machine = UNKNOWN
    ) -> Mapping[str, str]:
        return {"jsrun.env": "\n".join(sorted(environment.keys() & {"JSRUN_GRACE"}))}

    def problems(self) -> Iterator[str]:
        yield "launcher=jsrun needs jsrun, which is not installed"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setitem(LAUNCHERS, "jsrun", Jsrun)
    section = JsrunLauncher(kind="jsrun", device="cpu", nproc_per_node=2, nodes=3)
    return config().model_copy(update={"launcher": section, "run_dir": "/runs/a"})


@pytest.mark.filterwarnings("ignore:Pydantic serializer:UserWarning")  # it is in no union
def test_a_launcher_of_ones_own_is_asked_wherever_another_is(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Machine(free_port=7)
    command = ["jsrun", "--node=0", "--port=7", "/runs/a"]
    assert rank_command(run, Path("/runs/a"), machine=here) == command
    environment = rank_environment(run, here, {})
    assert (environment["JSRUN_GRACE"], environment["PYTHONUNBUFFERED"]) == ("30", "1")
    with pytest.raises(UserError, match="^launcher=jsrun needs jsrun, which is not installed$"):
        preflight.check_machine(run, here)
    assert "join /runs/a --node-rank N" in launcher_of(run).other_nodes()
    assert node_rank_of(run, 2) == 2

    dry_run.show([run], here)
    shown = capsys.readouterr().out
    assert "# /runs/a/jsrun.env\nJSRUN_GRACE\n" in shown
    assert "export JSRUN_GRACE=30\n" in shown
    assert shown.endswith("# command\njsrun --node=0 --port=7 /runs/a\n")


def test_who_joins_is_listed_where_nobody_has_to(run: RunConfig) -> None:
    with pytest.raises(UserError, match="launcher=accelerate and launcher=jsrun with launcher.no"):
        node_rank_of(resolved("local"), None)


def test_what_holds_where_a_kind_says_nothing() -> None:
    plain = Launcher(resolved("local"), resolved("local").launcher)
    assert plain.command(Task(Path("/runs/a")), "python", 0, UNKNOWN) == [
        *("python", "-m", "shardwright.train", "/runs/a")
    ]
    assert (plain.queue, plain.files({}), list(plain.problems())) == (None, {}, [])
    assert plain.other_nodes() == ""


def test_only_a_queues_runs_are_jobs() -> None:
    for kind, launcher in LAUNCHERS.items():
        assert resolved(kind).launcher.is_job == (launcher.queue is not None)


def test_what_the_ranks_ask_of_a_launchers_section() -> None:
    bound = resolved("torchrun", bind="cores").launcher
    numa = resolved("torchrun", Machine((9.0,)), bind="numa").launcher
    assert (bound.binds_cores, numa.binds_cores) == (True, False)
    job = SlurmLauncher(kind="slurm", gpus_per_node=4)
    assert (job.knows_ranks, job.gpus_of_node(1), job.is_elsewhere) == (False, 4, True)
    assert not any(resolved(kind).launcher.is_elsewhere for kind in LAUNCHERS if kind != "slurm")
