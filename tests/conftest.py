"""A small real corpus, a small valid config and warm ranks, for every test to start from."""

from __future__ import annotations

import json
import os
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from shardwright.train.process import signals
from tests import variants
from tests.distributed.pool import Ranks
from tests.fixtures import Freeze, RanksOf, TreeOf

# A shell starts `make test &` with Ctrl-C ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As in an active environment, where the commands that are printed begin with a bare name.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

# A few modules of the standard library, each large enough to be a document of its own.
_MODULES = ("argparse", "ast", "calendar", "cmd", "csv", "dis", "enum", "glob", "heapq", "inspect")


_OF_ONE_STACK = ("max_position_embeddings", "attention_dropout")

# A busy machine takes longer than hypothesis expects.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # before it is decided what has the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    variants.mark(items)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """Undo what a command that a test calls does to the process: it ends with it, tests go on."""
    before = {number: signal.getsignal(number) for number in signals.HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a jsonl file of real text: one function or class of the standard library a row."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    stdlib = Path(sysconfig.get_path("stdlib"))
    with path.open("w") as file:
        for module in _MODULES:
            for text in (stdlib / f"{module}.py").read_text().split("\n\n\n"):
                file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where all tests of a session share prepared data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_tree(corpus: Path, cache_dir: Path) -> TreeOf:
    """Return a function from an objective to the tree of a run that trains in seconds."""

    def tree(objective: str) -> dict[str, Any]:
        model: dict[str, Any] = {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 66,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "kind": "gpt2" if objective == "clm" else "roberta",
        }
        if objective == "span_corruption":
            model = {k: v for k, v in model.items() if k not in _OF_ONE_STACK} | {"kind": "t5"}
        return {
            "model": model,
            "objective": {"kind": objective},
            "data": {
                "kind": "text",
                "paths": [str(corpus)],
                "sequence_length": 32,
                "eval_fraction": 0.1,
                "cache_dir": str(cache_dir),
                "document_attention": False,
                "unpad": False,
            },
            "tokenizer": {"kind": "byte_bpe"},
            "strategy": {"kind": "ddp"},
            "precision": {},
            "trainer": {
                "max_steps": 20,
                "global_batch_size": 16,
                "micro_batch_size": 4,
                "learning_rate": 1e-3,
                "log_every_steps": 1,
                "eval_max_samples": 13,
            },
            "tracking": {"kind": "none"},
            "launcher": {"kind": "torchrun", "device": "cpu", "nproc_per_node": 2},
        }

    return tree


@pytest.fixture
def frozen_run(tmp_path: Path) -> Freeze:
    """Return a function that freezes a tree into a new run directory, as the launcher does."""
    count = 0

    def freeze(tree: dict[str, Any]) -> Path:
        nonlocal count
        count += 1
        run_dir = tmp_path / f"run-{count}"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
        return run_dir

    return freeze


@pytest.fixture(scope="session")
def ranks() -> Iterator[RanksOf]:
    """Return a function from a world size to its ranks, started once for all tests."""
    pools: dict[int, Ranks] = {}
    yield lambda world_size: pools.setdefault(world_size, Ranks(world_size))
    for pool in pools.values():
        pool.stop()
