"""DeepSpeed ZeRO, stages 0 to 3."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy
from shardwright.train.strategy.engine import Engine, divided
from shardwright.train.strategy.zero import (
    facts,
    forward_only,
    gradients,
    lean,
    masters,
    nvme,
)
from shardwright.train.strategy.zero.adam import deepspeed_cpu_adam
from shardwright.train.strategy.zero.masters import (
    Piece,
    flat_partitions,
    has_own_masters,
    joined,
    master_partitions,
    replicated_masters,
    to_hold,
)
from shardwright.train.strategy.zero.partition import partitioned
from shardwright.train.strategy.zero.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import PreTrainedModel

    from shardwright.train.checkpoint.format.lazy import PortableState
    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.state.host_memory import HostMemory
    from shardwright.train.strategy.training import EngineState, Training


class Zero(Engine):
    def __init__(self, config: RunConfig, layout: RankLayout) -> None:
        super().__init__(config, layout)
        assert isinstance(config.strategy, ZeroStrategy)
        self.strategy = config.strategy

    def settings(self) -> dict[str, Any]:
        return settings(self.config, self.layout)

    def training_arguments(self) -> dict[str, Any]:
        return {
            "bf16": self.config.precision.compute_dtype == "bf16",
            "deepspeed": self.settings(),
        }

    def expected(self) -> dict[str, Any]:
        return facts.expected(self.config, self.layout)

    def machine_problems(self) -> Iterator[str]:
        return nvme.problems(self.strategy, self.config.launcher.device)

    @staticmethod
    def adopt_process_group() -> None:
        """Without it deepspeed 0.19 takes the world size for 1 while ZeRO-3 builds the model."""
        lean.import_deepspeed()
        import deepspeed

        # On a CPU it would compile a shared-memory all-reduce first: a minute, or a crash where
        # there is no compiler (deepspeed 0.19 comm/torch.py, build_shm_op). gloo serves every
        # strategy.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    def shard(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        """Partition the parameters one by one at stage 3; the other stages start from them all.

        What has a master weight of its own gets its value with that, in `complete`: so it is read
        once.
        """
        from shardwright.train.model.weights import Zeros

        if has_own_masters(self.config):
            later = {name for name, p in model.named_parameters() if p.requires_grad}
            values = {name: Zeros() if name in later else value for name, value in values.items()}
        return partitioned(model, values, self.config, self.layout)

    def place(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        forward_only.check(self.strategy)
        config = forward_only.without_optimizer(self.config)
        placed: Any = partitioned(model, values, config, self.layout).eval()
        return placed if self.strategy.stage == 3 else placed.to(self.config.launcher.device)

    def forward_only(self, model: PreTrainedModel) -> Any:
        if self.strategy.stage < 3:
            return model
        import deepspeed

        config = forward_only.without_optimizer(self.config)
        # Without an optimizer the engine only gathers what each module needs.
        return deepspeed.initialize(model=model, config=settings(config, self.layout))[0]

    def expected_forward_only(self) -> dict[str, Any]:
        return forward_only.expected(self.config, self.layout)

    def read_back_forward_only(self, trainer: Training) -> dict[str, Any]:
        return forward_only.read_back(trainer)

    def adamw(
        self, groups: list[dict[str, Any]], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        if not self.strategy.has_own_adam:
            return super().adamw(groups, settings)
        moments_dtype = self.config.precision.moments_dtype
        return deepspeed_cpu_adam(groups, moments_dtype=moments_dtype, **settings)

    def complete(self, trainer: Training) -> None:
        masters.complete(trainer)
        if self.strategy.stage == 3 and trainer.config.trainer.compile is True:
            from shardwright.train.model.compilation import leave_hooks_alone

            leave_hooks_alone(trainer.model)

    def skip_by_gate(self, trainer: Training) -> None:
        device = trainer.args.device if self.strategy.offload_optimizer == "none" else "cpu"
        masters.judge_before_updates(trainer, device)

    def read_back(self, trainer: Training) -> dict[str, Any]:
        return facts.read_back(trainer)

    def restore_optimizer(self, trainer: Training, state: PortableState) -> None:
        from shardwright.train.strategy.state.moments import (
            check_names,
            restore_flat,
            restore_whole,
        )
        from shardwright.train.strategy.zero import swapped

        engine, optimizer = trainer.model_wrapped, trainer.innermost_optimizer()
        names = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
        check_names(state, names.values(), optimizer)
        if engine.zero_optimization_stage() == 0:
            whole = replicated_masters(engine)
            restore_whole(optimizer, state, {name: whole.get(p, p) for p, name in names.items()})
            return
        for index, (flat, pieces) in enumerate(flat_partitions(engine, names)):
            with swapped.in_memory(engine.optimizer, index):
                restore_flat(optimizer, flat, state, pieces)

    def own_weights(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        from shardwright.train.model.quantised import whole_parameters

        engine, stage = trainer.model_wrapped, self.strategy.stage
        replicated = replicated_masters(engine)
        on_all = []
        whole: Iterator[tuple[str, Any]] = whole_parameters(engine.module)
        for name, parameter in whole:
            if stage == 0:
                on_all.append((name, 0, replicated.get(parameter, parameter)))
            elif parameter.requires_grad:
                continue  # the optimizer has it
            elif stage == 3:
                _, _, start, length = to_hold(name, parameter)
                yield name, start, parameter.ds_tensor[:length]
            else:
                on_all.append((name, 0, parameter))
        yield from divided(on_all, trainer.args.process_index, trainer.args.world_size)
        if stage > 0:
            for flat, pieces in self._partitions(engine):
                for name, start, length, place in pieces:
                    yield name, start, flat[place : place + length]

    def show(self, trainer: Training, parts: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        engine = trainer.model_wrapped
        if self.strategy.stage < 3:
            super().show(trainer, parts)
            return
        # As DeepSpeed's own step does, whose optimizer gives partitions other values, too.
        zero, parameters = engine.optimizer, dict(engine.module.named_parameters())
        zero._partition_all_parameters()
        for name, _, values in parts:
            parameters[name].ds_tensor.data[: values.numel()].copy_(values)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def own_moments(
        self, trainer: Training, moment: str
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        engine, state = trainer.model_wrapped, trainer.innermost_optimizer().state
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        if self.strategy.stage == 0:
            whole = replicated_masters(engine)
            steps = ((name, whole.get(p, p)) for p, name in names.items())
            on_all = [(n, 0, state[p][moment]) for n, p in steps if moment in state.get(p, {})]
            yield from divided(on_all, trainer.args.process_index, trainer.args.world_size)
            return
        for flat, pieces in flat_partitions(engine, names):
            if moment in state.get(flat, {}):
                found = state[flat][moment].flatten()
                for name, start, length, place in pieces:
                    yield name, start, found[place : place + length]

    def own_gradients(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        named = trainer.model_wrapped.module.named_parameters()
        if self.strategy.stage == 0:
            on_all = [(name, 0, p.grad) for name, p in named if p.grad is not None]
            return divided(on_all, trainer.args.process_index, trainer.args.world_size)
        return gradients.own(trainer.model_wrapped)

    def before_update(self, trainer: Training, act: Callable[[], object]) -> None:
        gradients.before_update(trainer.model_wrapped, act)

    def local_weights(self, trainer: Training) -> Iterator[torch.Tensor]:
        from shardwright.train.model.quantised import whole_parameters

        engine = trainer.model_wrapped
        if engine.zero_optimization_stage() == 0:
            masters = replicated_masters(engine).values()
            yield from masters or (p for _, p in whole_parameters(engine.module))
            return
        for flat, pieces in self._partitions(engine):
            # What pads a partition is memory that nothing was ever written to, and may be NaN.
            for start, stop in joined((place, place + length) for _, _, length, place in pieces):
                yield flat[start:stop]

    @staticmethod
    def _partitions(engine: Any) -> Iterator[tuple[torch.Tensor, list[Piece]]]:
        """Yield this rank's flat master weights and what lies where in them."""
        from shardwright.train.strategy.zero import swapped

        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        flats = swapped.masters(engine.optimizer, master_partitions(engine.optimizer))
        for flat, (_, pieces) in zip(flats, flat_partitions(engine, names), strict=True):
            yield flat.detach().flatten(), pieces

    @staticmethod
    def release() -> None:
        # While its config lives, transformers loads every model into ZeRO-3 shards.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()

    def clean_up(self) -> None:
        nvme.discard(self.config)

    def save_state(
        self, trainer: Training, *, is_first: bool, into: HostMemory | None
    ) -> EngineState:
        from shardwright.train.checkpoint.format.layout import PARAMETER_ORDER
        from shardwright.train.strategy.state.deepspeed_files import DeepSpeedState

        engine = trainer.model_wrapped
        texts: dict[str, str] = {}
        if engine.zero_optimization_stage() == 0:
            # The file of this stage counts parameters as the optimizer does, and names none.
            whole = replicated_masters(engine)
            names = {whole.get(p, p): name for name, p in engine.module.named_parameters()}
            groups = trainer.innermost_optimizer().param_groups
            order = [names[parameter] for group in groups for parameter in group["params"]]
            texts[f"engine/{PARAMETER_ORDER}"] = json.dumps(order)
        return DeepSpeedState(engine, texts, is_first=is_first, into=into)
