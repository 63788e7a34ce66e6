"""Every shipped experiment trains: its own settings and data source, on a model made tiny."""

from __future__ import annotations

import functools
import http.server
import json
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import CONF, compose
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import from_tree
from tests.distributed.jobs import whole_run
from tests.e2e.cli import TINY
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_ends_with_a_model(
    name: str,
    tmp_path: Path,
    corpus: Path,
    cache_dir: Path,
    book_url: str,
    ranks: RanksOf,
) -> None:
    experiment = (CONF / "experiment" / f"{name}.yaml").read_text()
    ranks_wanted = 1 if "nproc_per_node: 1" in experiment else 2
    small = [
        *TINY,
        f"launcher.nproc_per_node={ranks_wanted}",
        "data.sequence_length=32",
        "data.eval_fraction=0.1",
        f"data.cache_dir='{cache_dir}'",
        "trainer.max_steps=2",
        "trainer.max_epochs=null",
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
    }
    (kind,) = (kind for kind in source if f"override /data: {kind}" in experiment)

    (job,) = compose([f"experiment={name}", *small, *source[kind]])
    here, run_dir = Machine(cores=2), tmp_path / "run"
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), here, str(run_dir))
    preflight.check(config, here)
    directories.create(config, run_dir)
    ranks(ranks_wanted)(whole_run, run_dir)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [2]
    model = AutoConfig.from_pretrained(run_dir / "final")
    assert model.num_hidden_layers == 2
    head = "ForMaskedLM" if config.objective.kind == "mlm" else "LMHeadModel"
    assert model.architectures[0].endswith(head)
    assert (run_dir / "final" / "model.safetensors").is_file()
