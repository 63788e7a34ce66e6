"""Hosts and slots out of DeepSpeed's hostfile, as DeepSpeed itself chooses them."""

from __future__ import annotations

import pytest
from deepspeed.launcher.runner import _parse_hostfile, parse_inclusion_exclusion

from shardwright.launchers.machine.hostfile import hosts, ranks_per_node
from shardwright.train.errors import UserError

FILE = """
# the lab
worker-0 slots=4
worker-1   slots=4   # at the window
worker-2 slots=2
"""


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, None),
        ("worker-1@worker-0:0,2", None),
        ("worker-2", None),
        (None, "worker-1:0"),
        (None, "worker-0@worker-2:1"),
    ],
)
def test_the_choice_is_deepspeeds_own(include: str | None, exclude: str | None) -> None:
    pool = _parse_hostfile(FILE.splitlines())
    expected = parse_inclusion_exclusion(pool, include or "", exclude or "")
    assert hosts(FILE, include, exclude) == dict(expected)


@pytest.mark.parametrize(
    ("text", "include", "exclude", "message"),
    [
        ("", None, None, "the/file names no host"),
        ("# lab\nme@a slots=2", None, None, "the/file: line 2, 'me@a slots=2', names a user"),
        ("me@a slots=2", None, None, "write a there, and the user into ~/.ssh/config (Host a, Us"),
        ("\ufeffa slots=2", None, None, "the/file: line 1 begins with a byte-order mark, which De"),
        ("a slots=1\nb slots=0", None, None, "the/file: line 2, 'b slots=0', gives no slot; wri"),
        ("a, slots=2", None, None, "the/file: line 1, 'a, slots=2': 'a,' is neither a host's na"),
        ("a slots=two", None, None, "the/file: line 1 is 'a slots=two'; write each as: host slo"),
        ("a slots=2\nb", None, None, "line 2 is 'b'; write each as: host slots=8"),
        ("a slots=2\na slots=4", None, None, "a is listed twice"),
        ("a slots=2", "b", None, "launcher.include=b: 'b' is not in the hostfile, which has a"),
        ("a slots=2", "a:2", None, "launcher.include=a:2: a has 2 slots, from 0 on, and no 2"),
        ("a slots=2", None, "a:x", "launcher.exclude=a:x: write slots as a:0,1"),
        ("a slots=2", None, "a", "launcher.exclude=a leaves no slot"),
    ],
)
def test_what_cannot_be_chosen_is_named(
    text: str, include: str | None, exclude: str | None, message: str
) -> None:
    with pytest.raises(UserError) as error:
        hosts(text, include, exclude, "the/file")
    assert message in str(error.value)


def test_hosts_of_different_sizes_are_refused() -> None:
    assert ranks_per_node({"a": [0, 1], "b": [2, 3]}) == 2
    with pytest.raises(UserError, match=r"the/file gives .* different numbers of slots \(a 2, b 1"):
        ranks_per_node({"a": [0, 1], "b": [0]}, "the/file")
