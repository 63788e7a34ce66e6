"""One rank alone, or PyTorch DDP: every rank holds the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.config import DdpStrategy
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.engine import divided
from shardwright.train.strategy.state.engine import DistributedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from transformers import PreTrainedModel

    from shardwright.train.checkpoint.format.lazy import PortableState
    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.training import Training


class Replicated(DistributedEngine):
    def settings(self) -> dict[str, Any]:
        if not isinstance(self.config.strategy, DdpStrategy):
            return {}
        return {
            "bucket_cap_mb": self.config.strategy.bucket_size_bytes / 2**20,
            "find_unused_parameters": False,
            # They are the same on all ranks, which compute them from the config.
            "broadcast_buffers": False,
        }

    def training_arguments(self) -> dict[str, Any]:
        # Autocast over fp32 weights; weights that are bf16 themselves need none.
        autocast = self.config.precision.master_dtype == "fp32"
        return {
            "bf16": self.config.precision.compute_dtype == "bf16" and autocast,
            **{f"ddp_{key}": value for key, value in self.settings().items()},
        }

    def shard(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        import torch

        from shardwright.train.model import quantised

        dtype = getattr(torch, TORCH_DTYPES[self.config.precision.master_dtype])
        quantised.fill(model, values, self.config, dtype)
        return model

    def place(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        # Autocast rounds its operands anew each time, so that it is the master weights it wants.
        return self.shard(model, values).eval().to(self.config.launcher.device)

    def complete(self, trainer: Training) -> None:
        """Reduce fp32 gradients in bf16 where that is asked for; pure bf16 does so by itself."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
            allreduce_hook,
            bf16_compress_hook,
        )

        precision, see = self.config.precision, trainer.see_local_gradients
        rounds = precision.reduce_dtype == "bf16" and precision.master_dtype == "fp32"
        if self.config.strategy.kind == "ddp" and (rounds or see is not None):
            hook: Any = bf16_compress_hook if rounds else allreduce_hook
            trainer.model_wrapped.register_comm_hook(
                None, hook if see is None else _seen(hook, see)
            )
        super().complete(trainer)

    def expected_forward_only(self) -> dict[str, Any]:
        precision = self.config.precision
        autocast = precision.compute_dtype != "fp32" and precision.master_dtype == "fp32"
        return {
            "engine": "none",
            "parameter_dtypes": [TORCH_DTYPES[precision.master_dtype]],
            "autocast_dtype": precision.compute_dtype if autocast else "no",
        }

    def read_back_forward_only(self, trainer: Training) -> dict[str, Any]:
        return whole_model(trainer) | {"autocast_dtype": trainer.accelerator.mixed_precision}

    def expected(self) -> dict[str, Any]:
        strategy, precision = self.config.strategy, self.config.precision
        facts: dict[str, Any] = {
            **self.expected_forward_only(),
            "engine": "DistributedDataParallel" if strategy.kind == "ddp" else "none",
            "world_size": self.layout.replicas,
        }
        if isinstance(strategy, DdpStrategy):
            facts["bucket_size_bytes"] = strategy.bucket_size_bytes
            facts["reduce_dtype"] = TORCH_DTYPES[precision.reduce_dtype]
            facts["gradients_are_views_of_buckets"] = True
            facts["broadcasts_buffers"] = False
        return facts

    def read_back(self, trainer: Training) -> dict[str, Any]:
        from torch.nn.parallel import DistributedDataParallel

        from shardwright.train.model.quantised import whole_parameters
        from shardwright.train.strategy.dtypes import dtype_names, moments_dtypes
        from shardwright.train.strategy.loss_scale import loss_scaling

        model = trainer.model_wrapped
        is_ddp = isinstance(model, DistributedDataParallel)
        # Quantised layers are facts of their own.
        dtypes = {str(p.dtype).removeprefix("torch.") for _, p in whole_parameters(trainer.model)}
        facts: dict[str, Any] = {
            "engine": "DistributedDataParallel" if is_ddp else "none",
            "world_size": model.process_group.size() if is_ddp else 1,
            "parameter_dtypes": sorted(dtypes),
            "autocast_dtype": trainer.accelerator.mixed_precision,
        }
        if is_ddp:
            facts["bucket_size_bytes"] = model.bucket_bytes_cap
            facts["gradients_are_views_of_buckets"] = model.gradient_as_bucket_view
            facts["broadcasts_buffers"] = model.broadcast_buffers
            hook = model._get_ddp_logging_data().get("comm_hook", "")
            compressed = "bf16" in hook or dtypes == {"bfloat16"}
            facts["reduce_dtype"] = "bfloat16" if compressed else "float32"
        autocast = facts["autocast_dtype"]
        facts["precision"] = {
            "compute": autocast if autocast != "no" else dtype_names(dtypes),
            "reduction": dtype_names([facts["reduce_dtype"]]) if is_ddp else "none",
            "master": dtype_names(dtypes),
            "moments": dtype_names(moments_dtypes(trainer.innermost_optimizer(), dtypes)),
        }
        return {**facts, **loss_scaling(trainer.accelerator.scaler)}

    def restore_optimizer(self, trainer: Training, state: PortableState) -> None:
        from shardwright.train.strategy.state.moments import check_names, restore_whole

        parameters = dict(trainer.model.named_parameters())
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        optimizer = trainer.torch_optimizer()
        check_names(state, parameters, optimizer)
        restore_whole(optimizer, state, parameters)

    def own_weights(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        from shardwright.train.model.quantised import whole_parameters

        held = [(name, 0, parameter) for name, parameter in whole_parameters(trainer.model)]
        return divided(held, trainer.args.process_index, trainer.args.world_size)

    def own_moments(
        self, trainer: Training, moment: str
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        state, named = trainer.torch_optimizer().state, trainer.model.named_parameters()
        held = [(name, 0, state[p][moment]) for name, p in named if moment in state.get(p, {})]
        return divided(held, trainer.args.process_index, trainer.args.world_size)

    def own_gradients(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        named = trainer.model.named_parameters()
        held = [(name, 0, p.grad) for name, p in named if p.grad is not None]
        return divided(held, trainer.args.process_index, trainer.args.world_size)

    def local_weights(self, trainer: Training) -> Iterator[torch.Tensor]:
        from shardwright.train.model import quantised

        yield from (parameter for _, parameter in quantised.whole_parameters(trainer.model))
        # Of packed weights it is the scales that may be no numbers.
        yield from quantised.scales(trainer.model)


def whole_model(trainer: Training) -> dict[str, Any]:
    """Return facts read off a model that each rank holds whole, in no engine."""
    from shardwright.train.model.quantised import whole_parameters

    wrapped = trainer.model_wrapped
    return {
        "engine": "none" if wrapped is trainer.model else type(wrapped).__name__,
        "parameter_dtypes": sorted(
            {str(p.dtype).removeprefix("torch.") for _, p in whole_parameters(trainer.model)}
        ),
    }


def _seen(hook: Any, see: Callable[[torch.Tensor], object]) -> Any:
    """Return a hook of DDP that shows a rank's own gradients before the other reduces them."""

    def seen(state: Any, bucket: Any) -> Any:
        see(bucket.buffer())
        return hook(state, bucket)

    seen.__annotations__ = {}  # which torch 2.13 compares with its classes, and here are texts
    seen.__qualname__ = hook.__qualname__  # by which `read_back` knows what reduces
    return seen
