"""What a launcher is to everything that starts ranks, and what holds where a kind says nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from shardwright.launchers.machine.facts import Machine
from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.config.launcher import LauncherSection
from shardwright.train.program import IMPORTS, PACKAGES, package_environment
from shardwright.train.run_directory.choice import Choice

NODE_CACHE = Path(tempfile.gettempdir()) / f"shardwright-{os.getuid()}"
UNKNOWN = Machine()

SectionT = TypeVar("SectionT", bound=LauncherSection)


@dataclass(frozen=True)
class Task:
    """What each rank runs: a module, of the run in a directory."""

    run_dir: Path
    module: str = "shardwright.train"
    arguments: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert self.run_dir.is_absolute(), "ranks may start in another directory"

    @property
    def words(self) -> list[str]:
        """The arguments of the module."""
        return [str(self.run_dir), *self.arguments]


class Queue(Protocol):
    """What takes runs, instead of this command, and starts them later and elsewhere."""

    NAME: str

    def new_runs(
        self,
        configs: Sequence[RunConfig],
        choices: Sequence[Mapping[str, str]],
        here: Machine,
        *,
        is_generated: bool = False,
        chosen: Sequence[Choice | None] = (),
    ) -> int:
        """Make the directories of runs and hand them over; return the exit code."""

    def again(self, config: RunConfig, choices: Mapping[str, str], here: Machine) -> int:
        """Hand a run over that has its directory already; return the exit code."""

    def waited(self, config: RunConfig) -> int:
        """Hand over what lies in a directory already, and wait; return its exit code.

        It ends with this command.
        """

    def show(self, configs: Sequence[RunConfig]) -> str:
        """Return what would be handed over, and by which command."""


class Launcher(Generic[SectionT]):
    """What starts the ranks of a run; a kind overrides what is different with it."""

    joins: ClassVar[bool] = False
    """It starts the ranks of its own node alone: each other node runs `shardwright join`."""
    has_pages: ClassVar[bool] = True
    """It writes pages of its own about a rank that fails, which go to a log of their own."""
    queue: ClassVar[Queue | None] = None

    def __init__(self, config: RunConfig, section: SectionT) -> None:
        self.config = config
        self.section = section
        """The config's section "launcher", as that of this kind."""

    # --- how this node's ranks are started ----------------------------------------------------

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        """Return the argv that has this node's ranks run a task. Pure."""
        del node_rank, machine
        return [python, "-m", task.module, *task.words]

    def variables(self) -> Mapping[str, str]:
        """Return what the launcher itself wants in its environment. Pure."""
        return {}

    def environment(
        self, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
    ) -> dict[str, str]:
        """Return the variables to add to the user's environment; of those that the user has set
        the chosen GPUs alone.

        A pure function of config, machine and user.
        """
        launcher = self.config.launcher
        wanted = {
            **package_environment(user, packages=packages),
            "OMP_NUM_THREADS": str(max(1, machine.cores // launcher.ranks_per_node)),
            **OF_PYTHON,
            **of_the_allocator(launcher, user),
            **self.variables(),
        }
        if launcher.nodes > 1:
            wanted |= caches(NODE_CACHE)
            if machine.interface is not None:
                wanted |= {f"{name}_SOCKET_IFNAME": machine.interface for name in ("GLOO", "NCCL")}
        if launcher.device == "cuda":
            # nvidia-smi's order, by which GPUs are counted and told apart before a run; CUDA's own
            # puts the fastest first.
            wanted["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if launcher.device == "cpu":
            wanted["DS_ACCELERATOR"] = "cpu"
            if machine.gpus:
                wanted["CUDA_VISIBLE_DEVICES"] = ""
            if machine.has_loopback and launcher.nodes == 1:
                # Gloo takes the address of the host's name otherwise, which need not be reachable.
                wanted["GLOO_SOCKET_IFNAME"] = "lo"
        chosen = {}
        if launcher.gpu_ids is not None:
            # By nvidia-smi's numbers, whatever the user's own environment says of their order.
            chosen = {
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, launcher.gpu_ids)),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            }
        return {**not_set_by(user, wanted), **chosen}

    def files(
        self, environment: Mapping[str, str], machine: Machine = UNKNOWN
    ) -> Mapping[str, str]:
        """Return what it reads from the run's directory, by file name. Pure.

        ``environment`` is what ``environment`` has returned, and more.
        """
        del environment, machine
        return {}

    # --- what its remote shell reaches ----------------------------------------------------------

    def hosts(self) -> Sequence[str]:
        """Return the nodes that its remote shell reaches; none where others start there by hand."""
        return ()

    def on_host(self, host: str, script: str) -> list[str]:
        """Return the argv that runs a script of a POSIX shell there, its streams being those here.

        Pure.
        """
        raise NotImplementedError("it reaches no hosts")

    def problems_with_hosts(self) -> Iterable[str]:
        """Return a message for each thing that reaching them needs and this machine lacks."""
        return ()

    # --- what else there is to say of it --------------------------------------------------------

    def problems(self) -> Iterable[str]:
        """Return a message for each thing that it needs here and this machine does not have."""
        return ()

    @property
    def gives_node_ranks(self) -> bool:
        """Whether a node that joins has to be told which one it is."""
        return True

    def other_nodes(self) -> str:
        """Return what to do on the other nodes; nothing where this command starts them all."""
        nodes = self.config.launcher.nodes
        if not self.joins or nodes == 1:
            return ""
        rank = ["--node-rank", "N"] if self.gives_node_ranks else []
        command = program.command("join", str(self.config.run_dir), *rank)
        return f"\non each of the {nodes - 1} other node(s)\n  {command}\n\n"


OF_PYTHON = {
    "PYTHONUNBUFFERED": "1",
    # Ranks fork their data loader's workers, after which tokenizers' threads deadlock.
    "TOKENIZERS_PARALLELISM": "false",
}
"""What every rank's Python gets, whatever starts it."""


def of_the_allocator(launcher: LauncherSection, user: Mapping[str, str]) -> dict[str, str]:
    """Let a GPU's memory grow where it is: sizes that vary else leave holes that nothing fits into.

    torch (2.11 and 2.13, c10/core/AllocatorConfig) reads it by either name. Pure.
    """
    if launcher.device != "cuda" or "PYTORCH_CUDA_ALLOC_CONF" in user:
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def caches(folder: Path) -> dict[str, str]:
    """Keep what a node compiles on the node: nodes may differ, and home be a slow disk."""
    return {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
    }


def not_set_by(user: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the wanted variables that the user has not set, and those of imports. Pure."""
    return {name: value for name, value in wanted.items() if name in IMPORTS or name not in user}
