"""The arguments of torchrun."""

from __future__ import annotations

import hashlib
from pathlib import Path

from train.config import TorchrunLauncher


def torchrun_arguments(launcher: TorchrunLauncher, run_dir: Path, node_rank: int) -> list[str]:
    start = ["-m", "torch.distributed.run"]
    counts = [f"--nproc-per-node={launcher.ranks_per_node}"]
    if launcher.max_restarts:
        counts.append(f"--max-restarts={launcher.max_restarts}")
    if launcher.bind == "numa":
        counts.append("--numa-binding=node")
    if launcher.nodes == 1:
        # It brings its own rendezvous on a free port of localhost.
        return [*start, "--standalone", "--nnodes=1", *counts]
    fewest = launcher.min_nodes or launcher.nodes
    nodes = f"{fewest}:{launcher.nodes}" if fewest < launcher.nodes else f"{launcher.nodes}"
    if launcher.rendezvous == "static":
        return [
            *(*start, f"--nnodes={nodes}", *counts, f"--node-rank={node_rank}"),
            *(f"--master-addr={launcher.head_address}", f"--master-port={launcher.head_port}"),
        ]
    # Left to itself, torchrun goes by names: on a machine that has the address of two nodes either
    # may serve the rendezvous and take it along when lost; where names differ from what the
    # machine calls itself, none does (elastic/rendezvous/c10d_rendezvous_backend.py, torch 2.13).
    serves = f"--rdzv-conf=is_host={int(node_rank == 0)}"
    # Two runs that meet at one address by mistake do not mix.
    name = hashlib.blake2b(str(run_dir).encode(), digest_size=8).hexdigest()
    return [
        *(*start, f"--nnodes={nodes}", *counts, "--rdzv-backend=c10d", f"--rdzv-id={name}"),
        *(f"--rdzv-endpoint={launcher.head_address}:{launcher.head_port}", serves),
    ]
