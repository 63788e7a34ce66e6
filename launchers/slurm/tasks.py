"""What a task of a job is, a rank or a node's launcher, in words for the job's shell. Pure.

A word is an argument as a program gets it; what only the job's shell knows, or each node's, stands
in it as an expression between NULs, which no argument can hold.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shardwright.launchers.kinds import deepspeed, torchrun

_WIDTH = 100


def of_job(expression: str) -> str:
    """Return what stands for what the job's shell makes of an expression."""
    return f"\0job {expression}\0"


def of_node(expression: str) -> str:
    """Return what stands for what a shell on each node makes of an expression."""
    return f"\0node {expression}\0"


# The names of slurm/job.sbatch.
PYTHON = of_job("$python")
RUN_DIR = of_job("$run_dir")
NODES = of_job("${#nodes[@]}")
RANKS_PER_NODE = of_job("$ranks_per_node")
HEAD, PORT = of_job("$MASTER_ADDR"), of_job("$MASTER_PORT")

RANK_VARIABLES = """\
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
"""
"""By which a task of srun is a rank."""


@dataclass(frozen=True)
class Tasks:
    """The step of a job in which its ranks run."""

    words: Sequence[str]
    """What each task runs."""
    of: Literal["rank", "node"] = "node"
    """Of what there is a task each."""
    before: str = ""
    """What the job's shell does once before the step."""
    variables: str = ""
    """What each node's shell sets for a task."""

    def text(self) -> str:
        """Return the lines of the job's script that say so."""
        each = {
            "rank": (
                "# A task is a rank, and srun's own process: under most clusters SLURM signals no "
                "other.\ntask=rank tasks_per_node=$ranks_per_node cpus_per_task=$cpus_per_rank"
            ),
            "node": (
                "# A task is a node's launcher, behind a parent that tells the ranks of signals.\n"
                "task=node tasks_per_node=1 cpus_per_task=$cpus_per_node"
            ),
        }
        start = _start(self.words, self.variables)
        command = _wrapped([in_shell(w) for w in self.words if not _is_of_node(w)])
        return f"{each[self.of]}\n{self.before}{command}\nstart={shlex.quote(start)}"


def in_shell(word: str) -> str:
    """Return a word as it is written in a shell script: quoted, but for its expressions."""
    found = ""
    for number, part in enumerate(word.split("\0")):
        if number % 2:
            found += f'"{part.partition(" ")[2]}"'
        elif part:
            found += shlex.quote(part)
    return found or "''"


def _is_of_node(word: str) -> bool:
    return "\0node " in word


def _start(words: Sequence[str], variables: str) -> str:
    """Return the script of a task, whose arguments are the words that the job's shell knows.

    Those that its node alone knows are put where they belong, counted from the end: site settings
    may put a command in front of all.
    """
    places = [number for number, word in enumerate(words) if _is_of_node(word)]
    if not places:
        return f'{variables}exec "$@"'
    first, last = places[0], places[-1]
    assert len(places) == last - first + 1 < len(words) - first, "side by side, before others"
    inserted = " ".join(in_shell(word) for word in words[first : last + 1])
    behind = len(words) - 1 - last
    return f'{variables}exec "${{@:1:$#-{behind}}}" {inserted} "${{@: -{behind}}}"'


def _wrapped(words: Sequence[str]) -> str:
    """Return the line that makes an array of words, continued where it is long."""
    lines = ["command=("]
    for word in words:
        first = lines[-1].endswith("(")
        if len(lines[-1]) + 1 + len(word) < _WIDTH:
            lines[-1] += word if first else f" {word}"
        else:
            lines.append(f"  {word}")
    return "\n".join(lines) + ")"


# --- what `launcher.starts` may be ----------------------------------------------------------------


def _ranks() -> Tasks:
    return Tasks([PYTHON, "-m", "shardwright.train", RUN_DIR], of="rank", variables=RANK_VARIABLES)


# SLURM with cgroup tracking signals a task's own process and nothing below it.
_RELAY = (PYTHON, "-m", "shardwright.launchers.relay", "--grace-seconds", of_job("$grace_seconds"))


def _torchrun() -> Tasks:
    words = torchrun.argv(
        PYTHON,
        nodes=NODES,
        ranks_per_node=RANKS_PER_NODE,
        rendezvous=torchrun.c10d(
            of_job("$SLURM_JOB_ID-$restarts"),
            f"{HEAD}:{PORT}",
            is_host=of_node("$((SLURM_NODEID == 0))"),
        ),
        module="shardwright.train",
        arguments=[of_job(r"${run_dir//\$/\$\$}")],  # as torchrun.plain has it
    )
    return Tasks([*_RELAY, *words])


def _deepspeed() -> Tasks:
    hostfile = f"{RUN_DIR}/hostfile"
    words = deepspeed.argv(
        PYTHON,
        switches=["--no_ssh"],
        port=PORT,
        hostfile=hostfile,
        further=[f"--master_addr={HEAD}", f"--node_rank={of_node('$SLURM_NODEID')}"],
        program=["--module", "shardwright.train", RUN_DIR],
    )
    lines = 'for node in "${nodes[@]}"; do echo "$node slots=$ranks_per_node"; done'
    return Tasks([*_RELAY, *words], before=f"{lines} >{in_shell(hostfile)}\n")


STARTS: Mapping[str, Callable[[], Tasks]] = {
    "ranks": _ranks,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
}
"""By `launcher.starts`."""
