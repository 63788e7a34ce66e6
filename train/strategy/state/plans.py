"""Who writes what of a distributed checkpoint: planned once, and kept while the state is the same.

Rank 0 plans for all ranks while they wait, at 512 of them for minutes. What it decides is made of
names, shapes, dtypes and placements, none of which a step changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor

from shardwright.train.run_directory.names import ENGINE_FOLDER


@dataclass(frozen=True)
class Plan:
    """This rank's part of a checkpoint, and on rank 0 what describes the whole of it."""

    mine: SavePlan
    metadata: Metadata | None
    """Without what each save adds for itself: where its files hold what."""


class Plans:
    """The plan of a training's saves, made anew where the state is of another form than it was.

    torch can keep plans too (`DefaultSavePlanner(enable_plan_caching=True)`, 2.13). It keeps them
    by the planner's class for the whole process, compares neither dtypes nor the sections of names,
    still has every rank send and get an object, and hands out the one description that its writer
    then changes.
    """

    def __init__(self) -> None:
        self._form: Any = None
        self._plan: Plan | None = None

    def of(self, planner: DefaultSavePlanner) -> Plan:
        """Return the plan of a planner that is set up. Collective: all ranks plan, or none does."""
        form = form_of(planner.state_dict, planner.mappings)
        plan = self._plan if form == self._form else None
        if not _everywhere(plan is not None) or plan is None:
            plan = _planned(planner)
            self._plan, self._form = plan, form
        planner.finish_plan(plan.mine)
        return plan


def form_of(state: Mapping[str, Any], mappings: Mapping[str, Any]) -> Any:
    """Return all of a flattened state that a plan is made of, to be compared with another's."""
    # In their order, which is that in the files.
    return list(mappings.items()), [(name, _form(name, value)) for name, value in state.items()]


def _form(name: str, value: Any) -> Any:
    local = value.to_local() if type(value) is DTensor else value
    if type(value) not in _PLAIN or hasattr(local, "__create_write_items__"):
        return _create_write_items(name, value)  # bytes, or divided in a way of its own
    own = (value.device_mesh, value.placements) if type(value) is DTensor else ()
    return value.shape, *own, TensorProperties.create_from_tensor(local)


_PLAIN = (DTensor, torch.Tensor, torch.nn.Parameter)


def _planned(planner: DefaultSavePlanner) -> Plan:
    """Have rank 0 decide who writes what. Collective."""
    plan = planner.create_local_plan()
    is_alone, is_first = not dist.is_initialized(), planner.is_coordinator
    plans: list[Any] = [plan] if is_alone else [None] * dist.get_world_size()
    metadata: Metadata | None = None
    if not is_alone:
        dist.gather_object(plan, plans if is_first else None)
    if is_first:
        plans, metadata = planner.create_global_plan(plans)
        plans = FileSystemWriter(ENGINE_FOLDER).prepare_global_plan(plans)
    if is_alone:
        return Plan(plans[0], metadata)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, plans if is_first else None)
    return Plan(mine[0], metadata)


def _everywhere(value: bool) -> bool:
    """Return whether it is true on all ranks. Collective."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
