"""Where nothing can be trained beside quantised weights: adapters, engines, devices."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.config.sections import Sections


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each thing that quantised weights do not allow. Pure."""
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return
    what = f"model.quantization={bits}"
    adapter, strategy, trainer = config.adapter, config.strategy, config.trainer
    if adapter.trains_all:
        yield (
            f"{what} with adapter=none would train quantised weights, which have no gradients; "
            "choose adapter=lora, or model.quantization=none"
        )
    if adapter.kind == "dora":
        yield (
            f"{what} with adapter=dora, which divides by the lengths of weights that it would find "
            "rounded and export whole; choose adapter=lora"
        )
    if (why := _NOT_UNDER.get(strategy.kind)) is not None:
        name = f"{strategy.kind}{getattr(strategy, 'stage', '')}"
        yield (
            f"{what} with strategy={name}, {why}; choose strategy=single or ddp, or "
            "model.quantization=none"
        )
    if config.launcher.device == "mps":
        yield (
            f"{what} needs kernels that are tried on CUDA GPUs and CPUs alone, but "
            "launcher.device=mps; set model.quantization=none"
        )
    if trainer.compile is True:
        yield (
            f"{what} with trainer.compile=true, which has not been tried on quantised layers; set "
            "trainer.compile=false, or auto, which then compiles nothing"
        )


# Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py, makes each parameter anew as an
# nn.Parameter when it is sharded and when it is gathered, without what bitsandbytes keeps on it.
_NOT_UNDER = {
    "zero": "whose dtypes, partitions and checkpoints have not been tried with packed weights",
    "fsdp": "which makes plain tensors of packed weights, without what it takes to unpack them",
}
