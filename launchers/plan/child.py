"""The child process that looks at models: the launcher has no torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Self

from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Traced
from shardwright.train.program import package_environment

Looked = tuple[ModelFacts, list[Traced]]
"""What a model is made of, and traces."""


class Looking:
    """A child that is kept while it is asked for one trace after the other, each of them once.

    It starts with the first question that has no answer yet, and ends with the block.
    """

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            assert self._child.stdin is not None
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            self._child.terminate()
            self._child.wait()
        self._stderr.close()

    def facts(self, config: RunConfig) -> ModelFacts:
        """Return what a run's model is made of; raise UserError where it cannot be built."""
        return ModelFacts.of_json(self._answer(config, None)["facts"])

    def traced(self, config: RunConfig, *, autocast: bool) -> Traced:
        """Return a trace of a run's micro-batch."""
        return Traced(**self._answer(config, autocast)["traced"][0])

    def _answer(self, config: RunConfig, autocast: bool | None) -> dict[str, Any]:
        """Return the facts, or with or without ``autocast`` a trace."""
        key = _key(config, autocast)
        if key not in _KNOWN:
            answer = self._asked(
                {
                    "config": config.model_dump(mode="json"),
                    "facts": autocast is None,
                    "autocasts": [] if autocast is None else [autocast],
                }
            )
            if "error" in answer:
                raise UserError(answer["error"])
            _KNOWN[key] = answer
        return _KNOWN[key]

    def _asked(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                COMMAND,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(asked).encode() + b"\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._child.wait()
            self._stderr.seek(0)
            raise _failed(self._stderr.read().decode(errors="replace"), code)
        found: dict[str, Any] = json.loads(line)
        return found


_KNOWN: dict[str, dict[str, Any]] = {}
"""What children of this process have answered: points of a sweep have most of it in common."""


def _key(config: RunConfig, autocast: bool | None) -> str:
    """Return what an answer depends on. Pure."""
    tree = config.model_dump(mode="json")
    read = (
        *("micro_batch_size", "checkpoint_activations_every_blocks", "recompute"),
        *("offload_activations", "compile", "fused_loss", "deterministic", "optimizer"),
    )
    sections = ("model", "adapter", "objective", "data", "tokenizer", "strategy", "precision")
    asked = {name: tree[name] for name in sections}
    return json.dumps([asked, {name: tree["trainer"][name] for name in read}, autocast])


def facts_of(config: RunConfig) -> ModelFacts:
    """Return what a run's model is made of; raise UserError where it cannot be built."""
    return looked_at(config, [])[0]


def looked_at(config: RunConfig, autocasts: Sequence[bool]) -> Looked:
    """Return what a run's model is made of, and traces of its micro-batch.

    There is one for each of ``autocasts``. Raises UserError where the model cannot be built.
    """
    return looked_at_each([(config, autocasts)])[0]


def looked_at_each(asked: Sequence[tuple[RunConfig, Sequence[bool]]]) -> list[Looked]:
    """Return the same of several runs, by two children beside each other where that is faster."""
    lines = [
        {"config": config.model_dump(mode="json"), "autocasts": list(autocasts)}
        for config, autocasts in asked
    ]
    shares = [lines[::2], lines[1::2]]
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda share: _answers(share) if share else [], shares)
    answers = [answer for pair in zip_longest(first, second) for answer in pair if answer]
    return [
        (
            ModelFacts.of_json(answer["facts"]),
            [Traced(**found) for found in answer.get("traced", [])],
        )
        for answer in answers
    ]


def _answers(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        COMMAND,
        input="".join(json.dumps(each) + "\n" for each in asked),
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _failed(done.stderr, done.returncode)
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if "error" in answer:
            raise UserError(answer["error"])
    return answers


COMMAND = (sys.executable, "-m", "shardwright.train.plan")


def _environment() -> dict[str, str]:
    # Of the machine that plans it is no matter which devices it has.
    return {**os.environ, **package_environment(os.environ), "CUDA_VISIBLE_DEVICES": ""}


def _failed(stderr: str, code: int) -> UserError:
    last = (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
    return UserError(f"the model cannot be looked at without training it: {last}")
