"""Leave the process group so that none of its threads outlives the training."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)

# accelerate and transformers say through the environment which engine the next Accelerator uses.
_ENGINE_CHOICES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DYNAMO_MODE",
)
MOST_ROUNDS_OF_GC = 10
TIMEOUT_SECONDS = 60.0
"""How long a process waits for peers when it leaves."""
_waiting: list[threading.Thread] = []
"""Threads in which a communicator was still waiting when its time was up."""
_PF_EXITING = 0x4  # linux/sched.h


def leave_process_group(timeout_seconds: float | None = None, *, has_failed: bool = False) -> None:
    """Destroy every process group, join its worker threads and forget what the libraries kept.

    Call it once, last, after success and after failure alike, from a frame that no longer holds
    the trainer, the model or the engine; nothing else needs to call `destroy_process_group`. It is
    not a collective: it never waits for a peer that has nothing in flight with this rank. A rank
    that fails half-way through a collective waits until its peers have left too, at most
    `timeout_seconds` (TIMEOUT_SECONDS), after which `is_pending`. Afterwards a new group can be
    made in the same process, for any strategy.

    A rank that ``has_failed`` aborts NCCL's communicators instead of destroying them, which would
    wait for what is in flight with peers that never learn of the failure.

    Why destroying alone is not enough: a gloo worker drops its reference to a finished collective
    some time after the main thread has waited. If a tensor of it has a Python wrapper, the
    drop takes the GIL (`ConcretePyInterpreterVTable::decref`), which ends the thread by
    `pthread_exit` once the interpreter finalises; unwinding through C++ then aborts the process.
    Only `~ProcessGroupGloo` joins the workers, and it runs when the last reference is gone.
    """
    _release_frames(sys.exception())
    _release_objects()
    _release_libraries()

    # Held here, so that the last reference is dropped below. Dropped by a C++ owner (DDP's reducer)
    # it would join the workers with the GIL held, while a worker waits for the GIL.
    groups: list[dist.ProcessGroup] = []
    wait_seconds = TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
    ends_at = time.monotonic() + wait_seconds
    is_destroyed = True
    if dist.is_available() and dist.is_initialized():
        groups.extend(distributed_c10d._world.pg_map)
        on_gpu = any("nccl" in backend for backend, _ in distributed_c10d._world.pg_map.values())
        destroy = (
            distributed_c10d._abort_process_group
            if has_failed and on_gpu
            else dist.destroy_process_group
        )
        is_destroyed = _done_by(ends_at, destroy)
    # A tensor that another one is a view of is no garbage to Python until that one is gone, and so
    # is all that hangs on it: the parameters of DeepSpeed's BF16_Optimizer go in the second round.
    for _ in range(MOST_ROUNDS_OF_GC):
        if gc.collect() == 0:
            break

    # The destructor waits for collectives in flight.
    if not (is_destroyed and _done_by(ends_at, groups.clear)):
        logger.warning(
            "a collective is still in flight %g s after training ended: a peer never joined it",
            wait_seconds,
        )
    elif left := gloo_worker_count():
        logger.warning(
            "%d gloo threads outlive training, which can abort the process as it exits: "
            "something still holds the model, the trainer or a process group",
            left,
        )


def forget_training(error: BaseException) -> None:
    """Let go of a training that has ended by an error, and stay in the process group for the next.

    Call it while the error is handled, from a frame that holds nothing of that training; the engine
    is to adopt the group again afterwards.
    """
    _release_frames(error)
    _release_objects()
    _release_libraries()
    for _ in range(MOST_ROUNDS_OF_GC):
        if gc.collect() == 0:
            break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_pending() -> bool:
    """Whether a communicator still waits for a peer, so that the interpreter cannot end in order.

    Only `os._exit` ends such a process for certain, and with the exit code that it asks for.
    """
    return any(thread.is_alive() for thread in _waiting)


def _done_by(ends_at: float, action: Callable[[], object]) -> bool:
    """Act in a thread, as what waits in C++ cannot be interrupted; return whether it has ended.

    The thread is daemonic: a peer that never answers must not keep a failed rank alive.
    """

    def act() -> None:
        try:
            action()
        except Exception:  # the process ends all the same
            logger.exception("the process group could not be left in order")

    thread = threading.Thread(target=act, name="leave_process_group", daemon=True)
    thread.start()
    thread.join(max(0.0, ends_at - time.monotonic()))
    if thread.is_alive():
        _waiting.append(thread)
        return False
    return True


def gloo_worker_count() -> int:
    """Count this process's gloo worker threads that have run; 0 where there is no /proc."""
    count = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # the thread ended while we looked
            continue
        # A joined thread stays listed for a moment, marked as exiting (field 9, the flags).
        exiting = int(fields.split()[6]) & _PF_EXITING
        count += name == "pt_gloo_runloop" and not exiting
    return count


def _release_frames(error: BaseException | None) -> None:
    """Clear the locals of the frames that an error being handled keeps alive, trainer included."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _release_libraries() -> None:
    """Forget what deepspeed, transformers and accelerate keep for the process, where loaded."""
    if offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        offload.FWD_MODULE_STACK.clear()
    if partition := sys.modules.get("deepspeed.runtime.zero.partition_parameters"):
        partition.shutdown_init_context()  # no-op unless a failure left zero.Init's patches behind
        vars(partition).update(top_level_context=None, zero_init_context=0)
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._release_process_group_references()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        vars(comm).update(cdb=None)
    if integration := sys.modules.get("transformers.integrations.deepspeed"):
        integration.unset_hf_deepspeed_config()
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
        for name in _ENGINE_CHOICES:
            os.environ.pop(name, None)
    if redistribute := sys.modules.get("torch.distributed.tensor._redistribute"):
        # torch 2.11 may lack either cache, and then holds nothing in it.
        for module, clear in (
            (redistribute, "clear_redistribute_planner_cache"),
            (torch._C, "_clear_DTensor_sharding_propagator_cache"),
        ):
            getattr(module, clear, lambda: None)()


def _release_objects() -> None:
    """Release the live objects, wherever they are, that hold a group from outside of any cycle."""
    engine_module = sys.modules.get("deepspeed.runtime.engine")
    engine_type = engine_module.DeepSpeedEngine if engine_module else ()
    mesh_module = sys.modules.get("torch.distributed.device_mesh")
    mesh_type = mesh_module.DeviceMesh if mesh_module else ()
    for found in gc.get_objects():  # by `type`, as isinstance runs the code of lazy proxies
        if type(found) is types.FunctionType:
            _forget_default_groups(found)
        elif type(found) is functools._lru_cache_wrapper:
            # DTensor's are keyed by device meshes, ZeRO-3's `__params_to_release` by modules.
            if str(getattr(found, "__module__", "")).startswith(("torch.distributed", "deepspeed")):
                found.cache_clear()
        elif issubclass(type(found), mesh_type):
            # torch 2.11 never drops what an operator on DTensors was first called with, the mesh
            # included (held by no Python object, so nothing here can let go of it).
            vars(found).get("_pg_registry", {}).clear()
        elif issubclass(type(found), engine_type):
            try:  # its hooks on the gradient accumulators are cycles through C++, unseen by gc
                found.destroy()
            except Exception:  # a half-built engine; the rest has to be released all the same
                logger.exception("DeepSpeed's engine could not be taken apart")


def _forget_default_groups(function: types.FunctionType) -> None:
    """Replace process groups among default arguments by None, which means the same to torch.

    `group=GroupMember.WORLD` is evaluated at import: None before a group exists, but that very
    group after (deepspeed.comm.torch, torch.distributed.nn.functional). The Trainer imports
    deepspeed when it is built, so that even a DDP run's group was held forever.
    """
    if function.__defaults__ and any(map(_is_group, function.__defaults__)):
        function.__defaults__ = tuple(
            None if _is_group(value) else value for value in function.__defaults__
        )
    if function.__kwdefaults__ and any(map(_is_group, function.__kwdefaults__.values())):
        function.__kwdefaults__ = {
            name: None if _is_group(value) else value
            for name, value in function.__kwdefaults__.items()
        }


def _is_group(value: object) -> bool:
    return issubclass(type(value), dist.ProcessGroup)
