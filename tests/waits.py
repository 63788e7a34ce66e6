"""Where a rank's host would wait for a GPU, found without one: what reads a tensor's values."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OF_VALUES = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave",
}
"""Whose result, or its size, depends on values: a GPU is waited for."""
OF_PYTHON = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__contains__"}
ON_THE_HOST = {
    # What is read there is in host memory already, or on its way there.
    "train/loop/ahead.py",
    "train/data/batches/collator.py",
    "train/model/labelled_head.py:positions_of",
    "train/strategy/finite.py:arrived",
    "torch/utils/data/dataloader.py",
}


@contextmanager
def noted(waits: Counter[str]) -> Iterator[None]:
    """Count inside of the block where values of tensors on the device are read."""

    def note(what: str) -> None:
        places = [
            f"{'/'.join(Path(frame.filename).parts[-4:])}:{frame.name}"
            for frame in traceback.extract_stack()[:-2]
        ]
        if not any(known in place for place in places for known in ON_THE_HOST):
            ours = [place for place in places if "torch/" not in place and "waits.py" not in place]
            waits[f"{what} in {' < '.join(reversed(ours[-3:]))}"] += 1

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = function._schema.name
            by_mask = name == "aten::index" and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if name in OF_VALUES or by_mask:
                note(name)
            return function(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(function, "__name__", "") in ("tolist", "numpy"):
                note(function.__name__)
            return function(*args, **(kwargs or {}))

    with ExitStack() as stack:
        stack.enter_context(Called())
        stack.enter_context(Dispatched())
        yield


@contextmanager
def _refused() -> Iterator[None]:
    """Raise inside of the block where the host waits for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of_a_step(run_dir: Path) -> dict[str, int]:
    """Train three steps; return where the host would wait in the second, which is not logged.

    On a GPU torch itself looks, and raises.
    """
    from shardwright.train.config import load
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.strategy.group import join

    with join(load(run_dir), rank_from_environment()):
        return _counted(run_dir)


def _counted(run_dir: Path) -> dict[str, int]:
    import io

    from transformers import TrainerCallback

    from shardwright.train.config import load
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.run import assemble

    waits: Counter[str] = Counter()
    stack = ExitStack()
    on_gpu = load(run_dir).launcher.device == "cuda"

    class SecondStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                stack.enter_context(_refused() if on_gpu else noted(waits))
            if state.global_step == 2:
                stack.close()

    trainer = assemble(run_dir, load(run_dir), rank_from_environment(), io.StringIO())
    trainer.add_callback(SecondStep())
    trainer.train()
    return dict(waits)
