"""What span corruption cannot be trained with, and why."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.sections import Sections
from shardwright.train.config.spans import SENTINELS


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each value that an encoder and a decoder together do not allow. Pure."""
    if config.objective.kind != "span_corruption":
        return
    yield from _samples_contradictions(config)
    what = f"objective={config.objective.kind}"
    if not config.adapter.trains_all:
        yield (
            f"{what} trains all weights: an adapter's targets are chosen, merged and saved for "
            f"models of one stack; set adapter=none instead of adapter={config.adapter.kind}"
        )
    if config.precision.fp8_recipe is not None:
        yield (
            f"{what} has rows of several lengths in a step, those of the encoder and of the "
            f"decoder, and precision.fp8_recipe={config.precision.fp8_recipe} was tried with one; "
            "choose precision=bf16"
        )
    if config.trainer.offload_activations:
        yield (
            f"{what} gives each block more than its input, biases of positions and what the "
            "encoder has read, which trainer.offload_activations=true would copy anew for each; "
            "set it to false"
        )
    if config.objective.neftune_noise_alpha:
        yield (
            f"{what} embeds inputs and targets by one matrix, and "
            f"objective.neftune_noise_alpha={config.objective.neftune_noise_alpha:g} adds its "
            "noise to inputs alone; set it to 0"
        )


def _samples_contradictions(config: Sections) -> Iterator[str]:
    """Yield why samples cannot be windows of the corpus that are as long as they need be."""
    objective, data = config.objective, config.data
    assert objective.kind == "span_corruption"
    what = f"objective={objective.kind}"
    if data.line_by_line:
        yield (
            f"{what} takes windows of as many tokens as fill inputs and targets, without padding, "
            "but data.line_by_line=true makes each line a sample; set it to false"
        )
    elif data.document_attention is True:
        yield (
            f"{what} takes documents back to back, as T5 does: a span may reach from one into the "
            "next, and then has no document that it could see alone; set "
            "data.document_attention=false"
        )
    if data.packing == "best_fit":
        yield (
            f"{what} takes windows of as many tokens as fill inputs and targets, without padding, "
            "which data.packing=best_fit leaves; set data.packing=concatenate"
        )
    if data.stages:
        yield (
            f"{what} has windows of one length, and data.stages have samples of their own; set "
            "data.stages=[]"
        )
    if data.sequence_length == "auto" or config.tokenizer.kind == "pretrained":
        return
    spans = objective.counts(data.sequence_length).spans
    if spans > SENTINELS:
        yield (
            f"{what} has {spans} spans in a sample of data.sequence_length={data.sequence_length} "
            f"(objective.noise_density={objective.noise_density:g}, "
            f"objective.mean_span_length={objective.mean_span_length:g}), and "
            f"tokenizer={config.tokenizer.kind} has {SENTINELS} sentinels to stand for them; "
            "shorten the samples or lengthen the spans"
        )
