"""One cluster for all tests; without SLURM they are skipped, or fail where it is demanded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import cli
from tests.slurm import runs
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        if os.environ.get("SHARDWRIGHT_REQUIRE_SLURM"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """Return the cluster, with every node up and no job."""
    yield running_cluster
    running_cluster.cancel_all()
    running_cluster.wait_for_nodes(*running_cluster.nodes)


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache_dir: Path) -> tuple[str, ...]:
    return runs.overrides(corpus, cache_dir)


@pytest.fixture(scope="session")
def uninterrupted(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run on two local ranks that nothing has disturbed."""
    cwd = tmp_path_factory.mktemp("local")
    local = ("launcher=torchrun", "launcher.nproc_per_node=2", "run_dir=run")
    ended = cli.shardwright("train", *tiny, *local, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return cwd / "run"
