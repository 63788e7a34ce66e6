"""launcher=torchrun, and the argv of torchrun for whatever else starts ranks by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

from shardwright.launchers.kinds.launcher import Launcher, Task
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import TorchrunLauncher


class Torchrun(Launcher[TorchrunLauncher]):
    """torchrun, on each node."""

    joins = True

    @property
    def gives_node_ranks(self) -> bool:
        return self.section.rendezvous == "static"

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        launcher = self.section
        options = []
        if launcher.max_restarts:
            options.append(f"--max-restarts={launcher.max_restarts}")
        if launcher.bind == "numa":
            options.append("--numa-binding=node")
        fewest = launcher.min_nodes or launcher.nodes
        nodes = f"{fewest}:{launcher.nodes}" if fewest < launcher.nodes else f"{launcher.nodes}"
        if launcher.nodes == 1:
            rendezvous: Sequence[str] = ()
        elif launcher.rendezvous == "static":
            rendezvous = (
                f"--node-rank={node_rank}",
                f"--master-addr={launcher.head_address}",
                f"--master-port={launcher.head_port}",
            )
        else:
            # Two runs that meet at one address by mistake do not mix.
            name = hashlib.blake2b(str(task.run_dir).encode(), digest_size=8).hexdigest()
            rendezvous = c10d(
                name,
                f"{launcher.head_address}:{launcher.head_port}",
                is_host=str(int(node_rank == 0)),
            )
        return argv(
            python,
            nodes=nodes,
            ranks_per_node=str(launcher.ranks_per_node),
            options=options,
            rendezvous=rendezvous,
            module=task.module,
            arguments=plain(task.words),
        )

    def variables(self) -> Mapping[str, str]:
        wanted = patience(self.section.grace_seconds)
        if self.section.nodes > 1 or self.section.max_restarts:
            # An agent that stays keeps the store in which the ranks met: ranks that are started
            # again find the addresses of those before them there, where nobody listens any more,
            # and a node that comes back is told nothing (torch 2.13: dynamic_rendezvous.py makes
            # no store for each round, which rendezvous.py takes for granted).
            wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return wanted


def argv(
    python: str,
    *,
    nodes: str,
    ranks_per_node: str,
    options: Iterable[str] = (),
    rendezvous: Iterable[str],
    module: str,
    arguments: Iterable[str],
) -> list[str]:
    """Return the argv of torchrun on one of ``nodes``. Pure.

    Without a ``rendezvous`` it brings its own, on a free port of localhost. ``arguments`` are in
    torchrun's notation (`plain`).
    """
    meets = [*rendezvous]
    return [
        *(python, "-m", "torch.distributed.run"),
        # Left to itself, its ranks meet at the machine's own name, and wait without end where that
        # does not resolve, as in a container (elastic/rendezvous/api.py, torch 2.13).
        *([] if meets else ["--standalone", "--local-addr=127.0.0.1"]),
        *(f"--nnodes={nodes}", f"--nproc-per-node={ranks_per_node}"),
        *options,
        *meets,
        *("-m", module, *arguments),
    ]


def c10d(name: str, endpoint: str, *, is_host: str) -> list[str]:
    """Return the flags by which nodes meet in any order; ``is_host`` is 1 on the first. Pure.

    Left to itself, torchrun goes by names: on a machine that has the address of two nodes either
    may serve the rendezvous and take it along when lost; where names differ from what the machine
    calls itself, none does (elastic/rendezvous/c10d_rendezvous_backend.py, torch 2.13).
    """
    return [
        *("--rdzv-backend=c10d", f"--rdzv-id={name}", f"--rdzv-endpoint={endpoint}"),
        f"--rdzv-conf=is_host={is_host}",
    ]


def plain(arguments: Iterable[str]) -> list[str]:
    """torchrun expands ${local_rank} in the arguments of its ranks, and takes $$ for a plain $."""
    return [argument.replace("$", "$$") for argument in arguments]


def patience(grace_seconds: float) -> dict[str, str]:
    """Return the variable for how long its agent waits for ranks that it has told to stop. Pure.

    Its own is 30 seconds, however long a checkpoint may take.
    """
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds))}
