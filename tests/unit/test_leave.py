"""How a process group is ended: which of torch's ways, by what has happened and on what."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardwright.train.process import leave


@pytest.mark.parametrize(
    ("backend", "has_failed", "way"),
    [
        ("cpu:gloo,cuda:nccl", True, "abort"),
        ("cpu:gloo,cuda:nccl", False, "destroy"),
        ("gloo", True, "destroy"),
    ],
)
def test_a_failed_rank_aborts_nccl_alone(
    backend: str, has_failed: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is a stand-in: NCCL has none without a GPU."""
    taken: list[str] = []
    monkeypatch.setitem(distributed_c10d._pg_map, object(), (backend, None))  # type: ignore[misc]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: taken.append("destroy"))
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: taken.append("abort"))
    leave.leave_process_group(has_failed=has_failed)
    assert taken == [way]
    assert not leave.is_pending()
