"""What ends a test on ranks leaves none of their answers for the next one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.distributed.pool import Ranks

pytestmark = pytest.mark.distributed


@pytest.fixture
def one() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


def interrupt(parent: int, answer: str) -> str:
    os.kill(parent, signal.SIGUSR1)
    time.sleep(0.2)  # it answers after its caller has gone
    return answer


def test_a_test_that_is_ended_leaves_no_answer(one: Ranks) -> None:
    def ended(*_: object) -> None:
        pytest.fail("ended as a timeout ends it")

    signal.signal(signal.SIGUSR1, ended)
    with pytest.raises(pytest.fail.Exception, match="ended as a timeout"):
        one(interrupt, os.getpid(), "of the one that was ended")
    assert one(str.upper, "its own") == ["ITS OWN"]
