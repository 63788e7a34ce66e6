"""The model card of final/: what was trained, on what, how, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.layout import Manifest
from train.models import parameter_count

if TYPE_CHECKING:
    from train.trainer import Trainer


@dataclass(frozen=True)
class Card:
    """README.md of a model directory, and the picture that it shows."""

    readme: str
    picture: str | None = None
    """loss.svg, which the README refers to where it is there."""

    def write(self, directory: Path) -> None:
        """Write README.md and, where there are losses to draw, loss.svg."""
        (directory / "README.md").write_text(self.readme, encoding="utf-8")
        if self.picture is not None:
            (directory / "loss.svg").write_text(self.picture, encoding="utf-8")


def recovered_card(
    config_json: Mapping[str, Any],
    origin: str,
    step: int | None,
    run_dir: Path | None,
    manifest: Manifest | None,
    dtype: str,
    parameters: int | None = None,
) -> Card:
    """Return the card of a model that was taken out of a checkpoint; write it with `Card.write`.

    ``config_json`` is the model's config.json as written, ``architectures`` included; ``origin``
    says where the weights come from, as a reader may see it ("checkpoint-500 of a Shardwright
    run"); no absolute path goes into a card. ``step`` is None where no file says it. ``run_dir``
    is the run that the checkpoint lies in, None for a foreign one; its files are read where they
    are there. ``dtype`` is that of the weights as written: fp32, bf16 or fp16. ``parameters`` is
    their number, tied ones once.
    """
    raise NotImplementedError


def model_card(
    trainer: Trainer, evaluation: Mapping[str, Any], checkpoint: Manifest | None = None
) -> str:
    """Return README.md with the hub's metadata header.

    ``checkpoint`` holds the weights, or the live engine where there is none; ``evaluation`` is
    theirs.
    """
    config = trainer.config
    samples, tokens, steps = (
        (trainer.samples_seen, trainer.tokens_seen, trainer.state.global_step)
        if checkpoint is None
        else (checkpoint.samples, checkpoint.tokens, checkpoint.step)
    )
    parameters = parameter_count(trainer.model)
    task = "text-generation" if config.objective.kind == "clm" else "fill-mask"
    settings = config.trainer
    rows = {
        "Architecture": f"{config.model.kind}, {parameters:,} parameters",
        "Objective": config.objective.kind,
        "Data": config.data.kind,
        "Tokenizer": config.tokenizer.kind,
        "Sequence length": f"{config.data.sequence_length} tokens",
        "Seen": f"{samples:,} samples, {tokens:,} tokens, {steps:,} steps",
        "Batch": f"{settings.global_batch_size} samples",
        "Optimizer": f"{settings.optimizer}, peak learning rate {settings.learning_rate:g}, "
        f"{settings.lr_scheduler} schedule, weight decay {settings.weight_decay:g}",
        "Precision": f"{config.precision.compute_dtype} compute, fp32 master weights",
        "Strategy": f"{config.strategy.kind} on {trainer.args.world_size} rank(s)",
    }
    measured = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in evaluation.items()
        if name in ("eval_loss", "eval_perplexity", "eval_masked_accuracy")
    }
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags: [shardwright]",
        "---",
        "",
        f"# {config.name}",
        "",
        "Trained from scratch with Shardwright."
        if config.model.kind != "pretrained"
        else f"Trained with Shardwright from `{config.model.name}`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
    ]
    if measured:
        lines += ["## On held-out documents", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in measured.items()]
        lines += [""]
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'pipeline("{task}", model="PATH")',
        "```",
        "",
    ]
    return "\n".join(lines)
