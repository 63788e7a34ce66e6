"""The model card of a training's result or of a recovered checkpoint, out of the run's files.

Imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train import config as run_config
from shardwright.train.charts import charts, drawing
from shardwright.train.charts.series import Series
from shardwright.train.checkpoint.format.layout import Manifest
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.export.card_text import PICTURE, Facts, readme_of
from shardwright.train.paths import is_hub_name
from shardwright.train.run_directory import history, metrics
from shardwright.train.run_directory.metrics import Point
from shardwright.train.run_directory.names import (
    DATA_JSON,
    METRICS,
    MODEL_FOLDER,
    ORIGIN_JSON,
    RESUMES,
    TOKENIZER_FOLDER,
)
from shardwright.train.units import counted

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer

README = "README.md"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """README.md of a model directory, and the picture that it shows."""

    readme: str
    picture: str | None = None
    """loss.svg, which the README refers to where it is there."""

    def write(self, directory: Path) -> None:
        """Write README.md and, where there are losses to draw, loss.svg."""
        (directory / README).write_text(self.readme, encoding="utf-8")
        if self.picture is not None:
            (directory / PICTURE).write_text(self.picture, encoding="utf-8")


def model_card(
    trainer: Trainer,
    evaluation: Mapping[str, Any],
    checkpoint: Manifest | None = None,
    *,
    averaged: str | None = None,
    draws: bool = True,
) -> Card:
    """Return the card of a training's result; ``averaged`` as in `Facts`.

    ``checkpoint`` holds the weights, or the live engine where there is none; ``evaluation`` is
    theirs. One that only shows that it can be made need not draw its picture.
    """
    from shardwright.train.model import adapter
    from shardwright.train.model.blocks import parameter_count

    step = None if checkpoint is None else checkpoint.step
    return card_of(
        Facts(
            config_json=trainer.model.config.to_dict(),
            dtype="fp32",
            parameters=parameter_count(adapter.bare(trainer.model)),
            trained=adapter.trained_count(trainer.model),
            step=trainer.state.global_step if checkpoint is None else checkpoint.step,
            samples=trainer.samples_seen if checkpoint is None else checkpoint.samples,
            tokens=trainer.tokens_seen if checkpoint is None else checkpoint.tokens,
            world_size=trainer.args.world_size if checkpoint is None else checkpoint.world_size,
            metrics=evaluation,
            averaged=averaged,
            generation=_generation(trainer),
            **_of_run(trainer.config, trainer.run_dir, until_step=step),
        ),
        draws=draws,
    )


def _generation(trainer: Trainer) -> dict[str, Any]:
    if not trainer.model.can_generate() or trainer.model.generation_config is None:
        return {}
    return trainer.model.generation_config.to_diff_dict()


def recovered_card(
    config_json: Mapping[str, Any],
    origin: str,
    step: int | None,
    run_dir: Path | None,
    manifest: Manifest | None,
    dtype: str,
    parameters: int | None = None,
    generation: Mapping[str, Any] | None = None,
    averaged: str | None = None,
) -> Card:
    """Return the card of a model that was taken out of a checkpoint; write it with `Card.write`.

    ``config_json`` is the model's config.json as written, ``architectures`` included; ``origin``
    says where the weights come from, as a reader may see it ("checkpoint-500 of a Shardwright
    run"); no absolute path goes into a card. ``step`` is None where no file says it. ``run_dir``
    is the run that the checkpoint lies in, None for a foreign one; its files are read where they
    are there. ``dtype`` is that of the weights as written: fp32, bf16 or fp16. ``parameters`` is
    their number, tied ones once, ``generation`` the generation settings beside them,
    ``averaged`` as in `Facts`.
    """
    step = manifest.step if manifest is not None else step
    of_run: dict[str, Any] = {}
    if run_dir is not None:
        with suppress(UserError):  # what cannot be read is not known
            of_run = _of_run(run_config.load(run_dir), run_dir, until_step=step)
    return card_of(
        Facts(
            config_json=config_json,
            dtype=dtype,
            origin=origin,
            parameters=parameters,
            step=step,
            samples=manifest.samples if manifest else None,
            tokens=manifest.tokens if manifest else None,
            world_size=manifest.world_size if manifest else None,
            metrics=_evaluated(manifest, averaged),
            averaged=averaged,
            generation=generation or {},
            **of_run,
        )
    )


def _evaluated(manifest: Manifest | None, averaged: str | None) -> Mapping[str, float]:
    """Return what was evaluated of the weights that are taken out of a checkpoint."""
    if manifest is None:
        return {}
    of_average = manifest.average is not None and manifest.average.replaces_weights
    return manifest.metrics if of_average == (averaged is not None) else {}


def average_in_words(kind: str, taken: int) -> str:
    """Return what an average of the weights is, as a card says it. Pure."""
    kinds = {"ema": "an exponential moving average", "uniform": "the plain mean"}
    what = kinds.get(kind, f"the average that trainer.optimizer={kind} keeps")
    return f"{what} of the weights of {counted(taken, 'step')}"


def _of_run(config: RunConfig, run_dir: Path, *, until_step: int | None) -> dict[str, Any]:
    """Return the facts that the files of a run hold; nothing of those that are not there."""
    base = config.model.name if config.model.kind == "pretrained" else None
    corpus, origin = _json(run_dir / DATA_JSON), _json(run_dir / MODEL_FOLDER / ORIGIN_JSON)
    tokens = _mapping(corpus.get("tokenizer")).get("tokens")
    tokenizer = run_dir / TOKENIZER_FOLDER
    starts = history.provenances(run_dir)
    return {
        "run": config,
        "base_model": base if base and is_hub_name(base) and not Path(base).exists() else None,
        "base_title": origin.get("title"),
        "base_config": _json(run_dir / MODEL_FOLDER / "config.json"),
        "drawn_anew": origin.get("drawn_anew") or (),
        "tokenizer_tokens": _tokens(tokenizer / "tokenizer.json") if tokens is None else tokens,
        "tokenizer_class": _json(tokenizer / "tokenizer_config.json").get("tokenizer_class"),
        "corpus": corpus,
        "provenance": _json(starts[-1]) if starts else {},
        "resumes": len(list((run_dir / RESUMES).glob("*.yaml"))),
        "curve": metrics.read(run_dir / METRICS, until_step),
    }


def _tokens(path: Path) -> int | None:
    """Return how many ids a tokenizer.json has; None where that is not there, or another's."""
    tree = _json(path)
    vocabulary = _mapping(tree.get("model")).get("vocab")
    if isinstance(vocabulary, dict):
        ids = set(vocabulary.values())
    elif isinstance(vocabulary, list):  # of Unigram, whose places are the ids
        ids = set(range(len(vocabulary)))
    else:
        return None
    return len(ids | {_mapping(token).get("id") for token in tree.get("added_tokens") or ()})


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def card_of(facts: Facts, *, draws: bool = True) -> Card:
    """Return what a card tells of these facts."""
    picture = _picture(facts.curve.points) if draws else None
    return Card(readme_of(facts, has_picture=picture is not None), picture)


def _picture(points: Sequence[Point]) -> str | None:
    """Return the losses as an SVG; None where no line can be drawn, or nothing can draw it here."""
    spec = charts.losses(_series(points, "loss"), _series(points, "eval_loss"))
    if spec is None:
        return None
    try:
        return drawing.svg(spec)
    except drawing.CannotDraw as error:
        logger.warning("the model card has no picture of the losses: %s", error)
        return None


def _series(points: Sequence[Point], name: str) -> Series:
    there = [point for point in points if getattr(point, name) is not None]
    return Series(
        [point.step for point in there],
        [point.tokens for point in there],
        [0.0] * len(there),  # when is not known, and not drawn
        [getattr(point, name) for point in there],
    )
