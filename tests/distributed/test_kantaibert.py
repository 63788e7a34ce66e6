"""KantaiBERT as published: the experiment beside a plain transformers Trainer on the same lines."""

from __future__ import annotations

import functools
import http.server
import json
import pydoc_data.topics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch.nn.utils.rnn import pad_sequence

from shardwright.launchers.composition.compose import compose
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import RunConfig, from_tree, samples_wanted, total_steps
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import Collator
from shardwright.train.data.batches.loader import collator
from shardwright.train.data.batches.sampler import SampleKey, sample_at
from shardwright.train.data.batches.samples import Window
from shardwright.train.model.build import build
from shardwright.train.model.first_values import materialize
from tests.distributed.jobs import whole_run
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed

EVERY_STEPS = 20


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Return a function that puts a book on a server of this machine and returns its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def book(text: str) -> str:
            (tmp_path / "www" / "book.txt").write_text(text, encoding="utf-8")
            return f"http://127.0.0.1:{server.server_address[1]}/book.txt"

        yield book
        server.shutdown()


def printed_lines() -> list[str]:
    """Return the lines of a book of prose that every interpreter has: the language's reference."""
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    return [line for line in topics.split("\n") if line.strip()]


def experiment(url: str, cache_dir: Path, run_dir: Path, *overrides: str) -> RunConfig:
    """Freeze the experiment with a smaller model and its own text into a run directory."""
    (job,) = compose(
        [
            "experiment=kantaibert",
            f"data.urls=['{url}']",
            f"data.cache_dir='{cache_dir}'",
            # Nothing is held out, so that both have all lines; and both draw no dropout.
            "data.eval_fraction=0",
            "model.dropout=0",
            "model.attention_dropout=0",
            "launcher.device=cpu",
            "launcher.nproc_per_node=2",
            "objective.prompts=[]",
            f"trainer.log_every_steps={EVERY_STEPS}",
            *overrides,
        ]
    )
    here = Machine(cores=2)
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), here, str(run_dir))
    directories.create(config, run_dir)
    return config


def published(config: RunConfig, lines: list[str], run_dir: Path) -> tuple[int, dict[int, float]]:
    """Train as the published script does; return its steps and the losses by step.

    A sample is a line, cut to 128 tokens, as in LineByLineTextDataset. First weights, order and
    masks are those of the run: means over this few steps differ by a percent between two draws.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    samples = tokenizer(lines, truncation=True, max_length=128)["input_ids"]
    made = collator(prepare(config, run_dir), config, config.seed)
    assert isinstance(made, Collator)
    masking = made.masking
    assert masking is not None

    def masked(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for feature in features:
            first, *inside, last = feature["input_ids"]
            window = Window(np.array(inside), None)
            ids, labels = masking(window, SampleKey(0, feature.pop("line")))
            feature["input_ids"] = [first, *ids.tolist(), last]
            feature["labels"] = [-100, *labels.tolist(), -100]
        rows = [torch.tensor(feature.pop("labels")) for feature in features]
        batch = tokenizer.pad(features, return_tensors="pt")
        batch["labels"] = pad_sequence(rows, batch_first=True, padding_value=-100)
        return dict(batch)

    class PlainTrainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            count = len(samples)
            return [sample_at(config.seed, count, place).sample for place in range(count)]

    arguments = transformers.TrainingArguments(
        output_dir=str(run_dir.parent / "published"),
        num_train_epochs=1,
        per_device_train_batch_size=64,
        logging_steps=EVERY_STEPS,
        logging_first_step=True,  # as the run does, whose next mean begins behind it
        learning_rate=config.trainer.learning_rate,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    model, values = build(config, tokenizer)
    materialize(model, values)
    trainer = PlainTrainer(
        model=model,
        args=arguments,
        data_collator=masked,
        train_dataset=[{"input_ids": ids, "line": i} for i, ids in enumerate(samples)],
    )
    trainer.train()
    history = trainer.state.log_history
    return trainer.state.global_step, {int(e["step"]): e["loss"] for e in history if "loss" in e}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (
            2_600,
            [
                "model.vocab_size=800",
                "model.hidden_size=32",
                "model.num_hidden_layers=2",
                "model.num_attention_heads=2",
                "model.intermediate_size=64",
                "trainer.learning_rate=2.0e-3",
            ],
        ),
        pytest.param(
            10_000,
            ["model.vocab_size=8000", "model.hidden_size=192", "model.intermediate_size=768"],
            marks=[pytest.mark.slow, pytest.mark.timeout(7200)],
        ),
    ],
)
def test_the_experiment_learns_what_the_published_script_learns(
    count: int,
    overrides: list[str],
    tmp_path: Path,
    serve: Callable[[str], str],
    ranks: RanksOf,
) -> None:
    lines, run_dir = printed_lines()[:count], tmp_path / "run"
    book = "\n\n".join(
        ["A book.", "*** START OF THE BOOK ***", *lines, "*** END OF THE BOOK ***", "."]
    )
    config = experiment(serve(book), tmp_path / "cache", run_dir, *overrides)
    ranks(2)(whole_run, run_dir, timeout_seconds=3600)  # the slow one trains for minutes
    entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    ours = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}

    noted = json.loads((run_dir / "data.json").read_text())["training"]
    assert noted["samples"] == noted["samples_per_epoch"] == len(lines)
    assert noted["lines_cut"] == noted["tokens_left_out"] == 0
    steps, theirs = published(config, lines, run_dir)
    assert steps == -(-len(lines) // 64)
    # The run's last step takes a whole batch, the plain one's what is left of the epoch.
    whole = range(EVERY_STEPS, len(lines) // 64 + 1, EVERY_STEPS)
    assert len(whole) >= 2
    wanted = samples_wanted(config, noted["samples_per_epoch"])
    assert total_steps(config.trainer, wanted) == steps
    assert {step: ours[step] for step in whole} == pytest.approx(
        {step: theirs[step] for step in whole}, rel=0.002
    )
    assert ours[whole[-1]] < 0.97 * ours[EVERY_STEPS], "it learns"
