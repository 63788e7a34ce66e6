"""Every shipped experiment trains: its own settings and data source, on a model made tiny."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import CONF, compose, resolved
from shardwright.launchers.machine import directories
from shardwright.launchers.machine.facts import Machine
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import (
    PretrainedModel,
    PretrainedTokenizer,
    RunConfig,
)
from tests.distributed.jobs import whole_run
from tests.e2e.cli import TINY
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed

STAGES = ("modernbert_base", "modernbert_base_long")
"""Of which the second begins with what the first has trained."""
FROM_A_MODEL = ("any_architecture", "continued_pretraining", "lora_clm", "qlora_clm")
EXPERIMENTS = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - {*STAGES})


@pytest.fixture(scope="module")
def book_url() -> Iterator[str]:
    """Return the address of a long text on a server of this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=sysconfig.get_path("stdlib"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/argparse.py"
        server.shutdown()


@pytest.fixture
def trained(
    tmp_path: Path, corpus: Path, cache_dir: Path, book_url: str, ranks: RanksOf
) -> Callable[..., tuple[Path, RunConfig]]:
    """Return a function that trains an experiment made small, with overrides, in its directory."""

    def train(name: str, *overrides: str) -> tuple[Path, RunConfig]:
        experiment = (CONF / "experiment" / f"{name}.yaml").read_text()
        alone = "override /launcher: local" in experiment
        ranks_wanted = 1 if alone or "nproc_per_node: 1" in experiment else 2
        is_sized = "override /model: pretrained" not in experiment
        is_sized = is_sized and "override /model: from_config" not in experiment
        small = [
            *(o for o in TINY if is_sized or not o.startswith("model.")),
            *([] if alone else [f"launcher.nproc_per_node={ranks_wanted}"]),
            "data.sequence_length=32",
            "data.eval_fraction=0.1",
            f"data.cache_dir='{cache_dir}'",
            "trainer.max_steps=2",
            "trainer.max_epochs=null",
            "trainer.max_tokens=null",
            "trainer.global_batch_size=8",
            "trainer.micro_batch_size=2",
            "trainer.log_every_steps=1",
            "trainer.eval_max_samples=8",
            # These have tests of their own; a worker of the pool may start no processes.
            "trainer.compile=false",
            "trainer.dataloader_workers=0",
        ]
        # The same source, of which as much as two steps need, and where it takes no network.
        source = {
            "stdlib": ["data.max_documents=40"],
            "kant": [f"data.urls=['{book_url}']", "data.max_cut_fraction=1"],
            "hub": [f"data.name='{corpus.parent}'"],
            "text": [f"data.paths=['{corpus}']", f"data.eval_paths={{own: '{corpus}'}}"],
        }
        (kind,) = (kind for kind in source if f"override /data: {kind}" in experiment)

        here, run_dir = Machine(cores=2), tmp_path / name
        asked = [f"experiment={name}", f"run_dir='{run_dir}'", *small, *source[kind], *overrides]
        (job,) = compose(asked)
        config = resolved(job, here, stamp="")
        preflight.check(config, here)
        directories.create(config, run_dir)
        ranks(ranks_wanted)(whole_run, run_dir)
        return run_dir, config

    return train


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {*FROM_A_MODEL}))
def test_experiment_ends_with_a_model(
    name: str, trained: Callable[..., tuple[Path, RunConfig]]
) -> None:
    check(*trained(name))


def test_experiments_that_begin_from_a_model_end_with_one(
    trained: Callable[..., tuple[Path, RunConfig]], tmp_path: Path
) -> None:
    base = trained("demo")[0] / "final"
    adapted, _ = check(*trained("lora_clm", f"model.name='{base}'"))
    assert (adapted / "final" / "adapter" / "adapter_model.safetensors").is_file()
    packed, _ = check(*trained("qlora_clm", f"model.name='{base}'"))
    assert json.loads((packed / "engine.json").read_text())["packed_weights"] == ["nf4 by 64"]

    masked = trained("demo_mlm")[0] / "final"
    continued, _ = check(*trained("continued_pretraining", f"model.name='{masked}'"))
    lines = (continued / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval_loss/own"] > 0

    described = tmp_path / "described"
    described.mkdir()
    shutil.copy(base / "config.json", described)
    sizes = ("model.overrides.num_hidden_layers=2", "model.vocab_size=384")
    check(*trained("any_architecture", f"model.name='{described}'", *sizes))


def check(run_dir: Path, config: RunConfig) -> tuple[Path, RunConfig]:
    """Hold a run of two steps to what each experiment comes to, and return it."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [2]
    model = AutoConfig.from_pretrained(run_dir / "final")
    assert model.num_hidden_layers == 2
    head = "ForMaskedLM" if config.objective.is_masked else "LMHeadModel"
    head = "ForConditionalGeneration" if config.objective.is_encoder_decoder else head
    assert model.architectures[0].endswith(head)
    assert (run_dir / "final" / "model.safetensors").is_file()
    return run_dir, config


def test_modernbert_is_trained_on_short_samples_and_then_on_long_ones(
    trained: Callable[..., tuple[Path, RunConfig]],
) -> None:
    grows = ("trainer.batch_warmup_from=4", "trainer.batch_warmup_samples=20")
    short, _ = trained(STAGES[0], "model.max_position_embeddings=32", "trainer.max_steps=3", *grows)
    lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if "loss" in line] == [4, 9, 15]
    facts = json.loads((short / "engine.json").read_text())
    assert facts["batch_warmup"] == {"from": 4, "to": 8, "samples": 20}
    assert (facts["rope_theta"], facts["local_rope_theta"]) == (10_000, 10_000)
    assert facts["schedule"]["name"] == "warmup_stable_decay"

    length = ("data.sequence_length=64", "model.max_position_embeddings=64")
    long, config = trained(STAGES[1], f"model.name='{short}'", *length, "trainer.max_steps=3")
    assert isinstance(config.model, PretrainedModel)
    assert isinstance(config.tokenizer, PretrainedTokenizer)
    assert config.model.name == str(short / "final")
    assert config.tokenizer.name == str(short / "tokenizer")
    facts = json.loads((long / "engine.json").read_text())
    assert facts["rope_theta"] == 160_000
    assert facts["schedule"]["decay_type"] == "1-sqrt"
    lines = [json.loads(line) for line in (long / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == 3 * 8 * 64
    model = AutoConfig.from_pretrained(long / "final")
    assert model.max_position_embeddings == 64
    bases = {kind: values["rope_theta"] for kind, values in model.rope_parameters.items()}
    assert bases == {"full_attention": 160_000, "sliding_attention": 10_000}
    card = (long / "final/README.md").read_text()
    assert (
        "160,000 in layers that attend to all of a sample, changed from 10,000; 10,000 in" in card
    )
