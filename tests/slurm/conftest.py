"""One cluster for all tests; without SLURM they are skipped, or fail where it is demanded."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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
