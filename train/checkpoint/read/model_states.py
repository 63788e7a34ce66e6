"""What DeepSpeed keeps in *_model_states.pt: shapes, buffers, frozen and tied names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.train.checkpoint.format.junk import is_junk
from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    Unreadable,
    describe,
    flat,
    lazy,
    part,
)

MODEL_FILE = "mp_rank_00_model_states.pt"
MODEL_FILE_OF_STAGE_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"

STAGE = "deepspeed.runtime.zero.config.ZeroStageEnum"
IGNORED = (
    # Classes of deepspeed 0.19 that its files name.
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    STAGE,
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    # What programs save beside their weights: arguments, paths, times, and random numbers as numpy
    # has them.
    "argparse.Namespace",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    "pathlib.PureWindowsPath",
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    "uuid.UUID",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    *(
        f"{package}.AttributeDict"
        for package in (
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "pytorch_lightning.utilities.parsing",
        )
    ),
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)
"""Their values are not needed, and their code is not run."""

_OF_ANOTHER_KIND = (
    (r"(?:zero_pp_rank_\d+_)?mp_rank_(?!00_)\d+.*", "a rank of model parallelism"),
    (r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_(?!00_)\d+.*", "a rank of model parallelism"),
    (r"(?:layer_\d+_)?expert_\d+.*|expp_rank_.*", "experts that are distributed over the ranks"),
    (r"layer_\d+.*", "a stage of a pipeline"),
)


@dataclass(frozen=True)
class ModelStates:
    """The described content of rank 0's model file."""

    path: Path
    values: Mapping[str, Any]
    is_stage_3: bool

    @property
    def ranks(self) -> int:
        return int(self.values["dp_world_size"])

    @property
    def step(self) -> int | None:
        step = self.values.get("global_steps")
        return step if isinstance(step, int) else None

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]] | None:
        """Names and shapes of trained parameters, a mapping per group; None at stage 0."""
        groups = self.values.get("param_shapes")
        if groups is None:
            return None
        groups = groups if isinstance(groups, list) else [groups]
        return [{name: tuple(shape) for name, shape in group.items()} for group in groups]

    @property
    def module(self) -> dict[str, torch.Tensor]:
        """The model's tensors; at stage 3 the weights among them are empty."""
        found = self.values["module"]
        return {n: t for n, t in found.items() if isinstance(t, torch.Tensor)}

    def buffers(self) -> dict[str, LazyTensor]:
        names = self.values.get("buffer_names") or ()
        return {n: lazy(t, self.path) for n, t in self.module.items() if n in set(names)}

    def tied(self) -> dict[str, str]:
        """The name under which a weight is kept, by each other name of it."""
        return dict(self.values.get("shared_params") or {})

    def frozen(self) -> dict[str, LazyTensor]:
        """Return the weights that the optimizer does not have, as the model holds them."""
        if self.is_stage_3:
            return self._frozen_shards()
        known = {name for group in self.shapes or [] for name in group}
        known |= set(self.values.get("buffer_names") or ()) | set(self.tied())
        return {n: lazy(t, self.path) for n, t in self.module.items() if n not in known}

    def _frozen_shards(self) -> dict[str, LazyTensor]:
        """Each rank has ceil(elements / ranks) of every one, the last ones padded."""
        shapes = self.values.get("frozen_param_shapes") or {}
        if not shapes:
            return {}
        parts = []
        for rank in range(self.ranks):
            path = self.path.with_name(MODEL_FILE_OF_STAGE_3.format(rank))
            if not path.is_file():
                raise Unreadable(f"{self.path.parent} holds frozen parameters and no {path.name}")
            parts.append((path, describe(path, IGNORED)["frozen_param_fragments"]))
        found = {}
        for name, shape in shapes.items():
            elements = math.prod(shape)
            pieces: list[Fragment] = []
            dtype = parts[0][1][name].dtype
            for path, fragments in parts:
                tensor, start = fragments[name], sum(piece.length for piece in pieces)
                if tensor.dtype != dtype:
                    raise Unreadable(f"{path} holds {name} in {tensor.dtype}, not in {dtype}")
                if length := min(tensor.numel(), elements - start):
                    pieces.append(part(flat(tensor, path), dtype.itemsize, 0, length, start))
            found[name] = LazyTensor(tuple(shape), dtype, tuple(pieces))
        return found


def is_there(directory: Path) -> bool:
    """Whether a directory looks like DeepSpeed's."""
    names = (p.name for p in directory.iterdir() if not is_junk(p.name))
    return any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names)


def read(directory: Path, *, of_model_parallelism: bool = False) -> ModelStates:
    """Describe the model file of a directory. Raises Unreadable.

    Unless ``of_model_parallelism`` is asked for, a directory with such ranks is refused, as one
    with a pipeline or experts always is.
    """
    for path in sorted(p for p in directory.iterdir() if not is_junk(p.name)):
        for pattern, what in _OF_ANOTHER_KIND[2 * of_model_parallelism :]:
            if re.fullmatch(pattern, path.name):
                raise Unreadable(
                    f"{directory} holds {path.name}: {what}; only checkpoints of pure data "
                    "parallelism (mp_rank_00) are read. DeepSpeed's ds_to_universal joins the ranks"
                )
    whole, of_stage_3 = directory / MODEL_FILE, directory / MODEL_FILE_OF_STAGE_3.format(0)
    if whole.is_file() and of_stage_3.is_file():
        raise Unreadable(
            f"{directory} holds {whole.name} and {of_stage_3.name}: one is of stages 0 to 2, the "
            "other of stage 3; remove those of the older checkpoint"
        )
    path = of_stage_3 if of_stage_3.is_file() else whole
    if not path.is_file():
        raise Unreadable(f"{directory} holds no {whole.name} and no {of_stage_3.name}")
    with layout_errors(directory):
        values = describe(path, IGNORED)
        if not isinstance(values["module"], Mapping):
            raise Unreadable(f"{path} holds no mapping of weights")
        return ModelStates(path, values, is_stage_3=path == of_stage_3)


@contextmanager
def layout_errors(directory: Path) -> Iterator[None]:
    """Turn what goes wrong with files of another layout into Unreadable."""
    try:
        yield
    except Unreadable:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise Unreadable(
            f"{directory} is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: "
            f"{error})"
        ) from None
