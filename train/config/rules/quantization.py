"""Where nothing can be trained beside quantised weights: adapters, engines, devices."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.config.sections import Sections
from shardwright.train.config.strategy import ZeroStrategy


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
    if isinstance(strategy, ZeroStrategy) and strategy.stage == 3:
        # bitsandbytes 0.50, autograd/_functions.py: MatMul4Bit keeps what was gathered for its
        # backward pass, and Linear8bitLt for good. FSDP takes the memory itself away.
        yield (
            f"{what} with strategy=zero3 would keep each packed weight gathered from the forward "
            "pass to the backward pass, and so whole on every rank; choose strategy=zero2 or fsdp, "
            "or model.quantization=none"
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
