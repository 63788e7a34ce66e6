"""The cluster that the other tests run on is what it says, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_two_nodes_with_names_gpus_and_cgroups_of_their_own(cluster: Cluster) -> None:
    seen = cluster.run(
        *("srun", "--nodes=2", "--gres=gpu:2", "bash", "-c"),
        'echo "$(hostname) $CUDA_VISIBLE_DEVICES $(grep -o slurm_node./uid.* /proc/self/cgroup)"',
    )
    lines = sorted(line.split() for line in seen.splitlines())
    assert [line[:2] for line in lines] == [["node1", "0,1"], ["node2", "0,1"]]
    assert lines[0][2].startswith("slurm_node1/")


def test_a_stopped_cluster_leaves_no_process_mount_or_interface(
    tmp_path: Path, running_cluster: Cluster
) -> None:
    def traces() -> list[str]:
        lines = [line for line in Path("/proc/mounts").read_text().splitlines() if mark in line]
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark.encode() in path.read_bytes():
                    lines.append((path.parent / "comm").read_text())
            except OSError:
                continue
        return lines

    mark = str(tmp_path)
    interfaces = Path("/proc/net/dev").read_text().count(":")
    cluster = Cluster(tmp_path / "second")
    try:
        cluster.start()
        assert any("slurmd" in line for line in traces())
    finally:
        cluster.stop()
    assert traces() == []
    assert running_cluster.run("srun", "--nodes=2", "hostname"), "the other cluster is untouched"
    assert Path("/proc/net/dev").read_text().count(":") == interfaces
