"""Processes that are forked from one that has imported everything a run imports.

Importing torch, transformers and deepspeed costs ten seconds of a core: once for each process that
runs tests, and not once for each rank.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from unittest import mock


def on_cpus() -> ForkServerContext:
    """Return what starts processes that have imported everything, and use no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.everything"])
    set_for_ranks()
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # as the server imports deepspeed
        forkserver.ensure_running()
    return context


def anywhere() -> SpawnContext:
    """Return what starts processes that import all by themselves: a CUDA context has no fork."""
    set_for_ranks()
    return multiprocessing.get_context("spawn")


def set_for_ranks() -> None:
    """Set what is read when torch and its like are imported."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


def look_away_from_what_stays() -> None:
    """Have later collections skip what is alive now, mostly imports: half of a run's time else.

    Caches are what `leave_process_group` has to find again, by `gc.get_objects`.
    """
    gc.collect()
    caches = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    gc.freeze()
    for cache in caches:
        ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(cache))
        ctypes.pythonapi.PyObject_GC_Track(ctypes.py_object(cache))
