"""How long this rank has waited for others, as far as its host notices: gloo's works, by the clock.

NCCL's return at once, and their devices wait instead.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

waited_ns = 0
"""Of the thread that trains, since the process began."""
_is_counting = False


def count() -> None:
    """Count from now on, whoever waits: c10d's own functions, FSDP2 and DeepSpeed end in this one.

    DDP's reducer waits in C++, where `add` is told of it.
    """
    global _is_counting
    if _is_counting or not dist.is_available():
        return
    _is_counting = True
    wait, main = dist.Work.wait, threading.main_thread().ident

    def counted(work: Any, *arguments: Any, **options: Any) -> Any:
        began_ns = time.perf_counter_ns()
        try:
            return wait(work, *arguments, **options)
        finally:
            if threading.get_ident() == main:
                add(time.perf_counter_ns() - began_ns)

    dist.Work.wait = counted  # type: ignore[method-assign, assignment]


def add(nanoseconds: int) -> None:
    """Count what was waited for elsewhere."""
    global waited_ns
    waited_ns += nanoseconds
