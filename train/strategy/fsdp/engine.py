"""PyTorch FSDP2, applied by `fully_shard` itself.

accelerate's own FSDP path is not taken: on a CPU it falls back to DDP without a word, and its
activation checkpointing gives wrong gradients with dropout.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from shardwright.train.strategy.engine import divided
from shardwright.train.strategy.fsdp import facts
from shardwright.train.strategy.fsdp.settings import settings
from shardwright.train.strategy.fsdp.sharding import held, sharded, sharded_as
from shardwright.train.strategy.state.engine import DistributedEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from shardwright.train.checkpoint.format.lazy import PortableState
    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.training import Training


class Fsdp(DistributedEngine):
    places_model = True

    def settings(self) -> dict[str, Any]:
        return settings(self.config, self.layout)

    def training_arguments(self) -> dict[str, Any]:
        return {"bf16": self.config.precision.compute_dtype == "bf16"}

    def shard(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        return sharded(model, values, self.config, self.layout, self.config.precision.master_dtype)

    def place(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        # What is gathered is rounded to the dtype of compute as a whole: shards may be as well.
        dtype = self.config.precision.compute_dtype
        return sharded(model, values, self.config, self.layout, dtype).eval()

    def expected_forward_only(self) -> dict[str, Any]:
        return facts.expected_forward_only(self.config, self.layout)

    def read_back_forward_only(self, trainer: Training) -> dict[str, Any]:
        return facts.read_back_forward_only(trainer)

    def expected(self) -> dict[str, Any]:
        return facts.expected(self.config, self.layout)

    def read_back(self, trainer: Training) -> dict[str, Any]:
        return facts.read_back(trainer)

    def restore_optimizer(self, trainer: Training, state: PortableState) -> None:
        from shardwright.train.strategy.state.moments import check_names, entries

        optimizer = trainer.torch_optimizer()
        parameters: dict[str, Any] = dict(trainer.model.named_parameters())
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        check_names(state, parameters, optimizer)
        for name, parameter in parameters.items():
            take = functools.partial(sharded_as, parameter)
            optimizer.state[parameter] = entries(optimizer, parameter, state, name, take)

    def after_evaluation(self, trainer: Training) -> None:
        """Shard the parameters again: without resharding after forward only a backward does it."""
        from torch.distributed.fsdp import FSDPModule

        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def show(self, trainer: Training, parts: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        from shardwright.train.strategy.shown import show_sharded

        self.after_evaluation(trainer)
        parameters: dict[str, Any] = dict(trainer.model.named_parameters())
        mesh = next(iter(parameters.values())).device_mesh
        show_sharded(
            {name: (held(p)[0], p.to_local()) for name, p in parameters.items()},
            parts,
            mesh.get_group(0) if self.layout.replicas > 1 else None,
        )

    def own_weights(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        from shardwright.train.model.quantised import whole_parameters

        return self._own(trainer, dict(whole_parameters(trainer.model)))

    def own_moments(
        self, trainer: Training, moment: str
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        state, named = trainer.torch_optimizer().state, trainer.model.named_parameters()
        of = {name: state[p][moment] for name, p in named if moment in state.get(p, {})}
        return self._own(trainer, of)

    def own_gradients(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        named = trainer.model.named_parameters()
        return self._own(trainer, {name: p.grad for name, p in named if p.grad is not None})

    def _own(
        self, trainer: Training, tensors: Mapping[str, Any]
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        rank, held_here = trainer.args.process_index, []
        for name, tensor in tensors.items():
            start, _ = held(tensor)
            held_here.append((name, start, tensor.to_local()))
        return divided(held_here, self.layout.replica_rank(rank), self.layout.replicas)

    def local_weights(self, trainer: Training) -> Iterator[torch.Tensor]:
        from torch.distributed.tensor import DTensor

        from shardwright.train.model.quantised import scales, whole_parameters

        for _, parameter in whole_parameters(trainer.model):
            assert isinstance(parameter, DTensor)
            yield parameter.to_local()
        yield from scales(trainer.model)
