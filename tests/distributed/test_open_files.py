"""The limit of open files, and how many of them gloo's groups take."""

import resource
import subprocess
import sys

import pytest

from shardwright.train.process.open_files import raised
from tests.fixtures import RanksOf

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, 1_048_576, 65_536),
        (1024, INFINITE, 65_536),
        (100_000, 1_048_576, 100_000),
        (INFINITE, INFINITE, INFINITE),
        (1024, 1024, 1024),
    ],
)
def test_a_limit_is_raised_as_far_as_it_serves_and_never_lowered(
    soft: int, hard: int, expected: int
) -> None:
    assert raised(soft, hard) == expected


def test_what_is_started_has_the_raised_limit() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _STARTS_A_CHILD], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "300 before, 4096 in the child\n"


_STARTS_A_CHILD = """
import resource, sys
from shardwright.launchers.ranks import child

resource.setrlimit(resource.RLIMIT_NOFILE, (300, 4096))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], "before,", end=" ", flush=True)
code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 'in the child')"
child.run([sys.executable, "-c", code], {})
"""


@pytest.mark.distributed
def test_a_group_of_gloos_takes_a_socket_for_each_peer_and_one_to_listen(ranks: RanksOf) -> None:
    """The library's behaviour from which `needed_open_files` follows."""
    assert ranks(4)(sockets_of_a_group) == [4] * 4


def sockets_of_a_group() -> int:
    import os

    import torch.distributed as dist

    from shardwright.train.process.leave import leave_process_group

    def sockets() -> set[str]:
        """Return them by inode: those of an earlier group may close while this one opens."""
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                found.add(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:  # that of the directory itself, or closed in between
                continue
        return {name for name in found if name.startswith("socket:")}

    dist.init_process_group("gloo")
    try:
        before = sockets()
        group = dist.new_group(backend="gloo")
        dist.barrier(group)
        return len(sockets() - before)
    finally:
        leave_process_group()
