"""What a rank sends in a training step at 1,024 ranks: python -m benchmarks.collectives.

No machine is needed: torch's fake process group answers every collective at once, and each is noted
as it is called. A real engine trains a real, small model, as the first of the ranks; what the other
ranks would send is what this one sends.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

RANKS = 1024
MICRO_BATCHES = 2
RANKS_OF_A_NODE = 8
STRATEGIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ddp", "zero0", "zero1", "zero2"), ()),
    # This model is smaller than what DeepSpeed keeps gathered by default; a large one is not.
    "zero3": tuple(
        f"strategy.{name}_elements=0"
        for name in ("max_live", "max_reuse_distance", "prefetch", "persistence")
    ),
    **dict.fromkeys(("fsdp", "fsdp_grad_op"), ()),
    "fsdp_hybrid": (f"strategy.replicas={RANKS // RANKS_OF_A_NODE}",),
}
"""By the names of conf/strategy/, each with what it is measured with."""
RUN = (
    "model=gpt2_tiny",
    "model.hidden_size=1024",
    "model.intermediate_size=4096",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=16",
    "model.vocab_size=1024",
    "tokenizer.vocab_size=1024",
    "objective=clm",
    "precision=bf16",
    "data.sequence_length=32",
    "data.eval_fraction=0",
    "data.max_documents=40",
    "launcher=torchrun",
    "launcher.device=cpu",
    f"launcher.nproc_per_node={RANKS}",
    "trainer.max_steps=2",
    "trainer.micro_batch_size=1",
    f"trainer.global_batch_size={MICRO_BATCHES * RANKS}",
    "trainer.log_every_steps=2",
)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "strategies.md"
BEGIN = "<!-- Counted by `python -m benchmarks.collectives`. -->"
END = "<!-- The end of what is counted. -->"


class Sent(NamedTuple):
    """One kind of collective."""

    name: str
    dtype: str
    ranks: int
    """Of the group that it is a collective of."""


@dataclass(frozen=True)
class Collectives:
    """All of one kind in one rank's second step."""

    sent: Sent
    calls: int
    per_parameter: float
    """Elements of the larger of what goes in and what comes out, for each of the model's."""

    @property
    def volume(self) -> float:
        """How many elements a rank sends, and receives, in rings, for each of the model's.

        Rajbhandari et al. 2020, section 7.1: a reduction that leaves each rank a part, or a
        gathering of such parts, moves all elements but the rank's own; an all-reduce is one after
        the other.
        """
        once = self.per_parameter * (self.sent.ranks - 1) / self.sent.ranks
        return 2 * once if self.sent.name == ALL_REDUCE else once

    @property
    def volume_bytes(self) -> float:
        """The same in bytes."""
        return self.volume * _ITEM_BYTES[self.sent.dtype]


def of_the_paper(strategy: str) -> float:
    """Return the volume of a step, in the model's parameters, by section 7 of the paper. Pure.

    Stages 0 and 1 reduce once a step, the others in each micro-batch. Ranks are many.
    """
    gather = reduce = 1
    if strategy in {"ddp", "zero0"}:
        return reduce + gather
    if strategy in {"zero1", "zero2"}:
        return reduce * (MICRO_BATCHES if strategy == "zero2" else 1) + gather
    if strategy == "fsdp_grad_op":  # one gathering serves forward and backward
        return MICRO_BATCHES * (gather + reduce)
    whole = MICRO_BATCHES * (2 * gather + reduce)
    if strategy == "fsdp_hybrid":  # and an all-reduce of each shard over the replicas
        n = RANKS_OF_A_NODE
        return whole * (n - 1) / n + 2 / n
    return whole


ALL_REDUCE = "all-reduce"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_NAMES = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
}


@contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """Be the first of ``ranks`` ranks whose collectives end at once, as if all said the same."""
    from unittest import mock

    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from shardwright.train.model import first_values
    from shardwright.train.process import agreement
    from shardwright.train.process.meeting import Meeting

    def gathered(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    # accelerate 1.15 takes no other backend for a CPU's.
    backend = mock.patch.object(dist, "get_backend", return_value="gloo")
    # Nobody hands out first values, nor comes to a meeting.
    not_dealt = mock.patch.object(first_values, "DEALT_FROM_ELEMENTS", sys.maxsize)
    alone = mock.patch.object(agreement, "Meeting", side_effect=lambda *_: Meeting(None, 0, 1))
    objects = mock.patch.object(dist, "all_gather_object", gathered)
    try:
        with backend, not_dealt, alone, objects:
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def noted(calls: Counter[Sent], elements: Counter[Sent]) -> Iterator[None]:
    """Count each collective of torch's that is called inside the block."""
    import torch
    from torch.distributed import ProcessGroup
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            namespace, _, name = function._schema.name.partition("::")
            if namespace == "c10d" and name in _NAMES:
                tensors = [[t for t in tree_leaves(a) if isinstance(t, torch.Tensor)] for a in args]
                sizes = [sum(t.numel() for t in found) for found in tensors]
                group = next(a for a in args if isinstance(a, torch.ScriptObject))
                first = next(t for found in tensors for t in found)
                sent = Sent(
                    _NAMES[name],
                    str(first.dtype).removeprefix("torch."),
                    ProcessGroup.unbox(group).size(),
                )
                calls[sent] += 1
                elements[sent] += max(sizes)
            return function(*args, **(kwargs or {}))

    with Noting():
        yield


def _reduction() -> Any:
    """Return what reduces a bucket of DDP's as DDP does, but for a result, which fakes have not."""
    import torch
    import torch.distributed as dist

    def reduced(state: Any, bucket: Any) -> Any:
        dist.all_reduce(bucket.buffer())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    reduced.__annotations__ = {"bucket": dist.GradBucket}  # which DDP compares
    return reduced


def count(run_dir: Path) -> list[Collectives]:
    """Train two steps of a frozen run, alone in a world of fakes; return what the second sends.

    Without what is too little to matter: flags and numbers.
    """
    from transformers import TrainerCallback

    from shardwright.train.config import load
    from shardwright.train.model.blocks import parameter_count
    from shardwright.train.process.rank import Rank
    from shardwright.train.run import assemble
    from shardwright.train.strategy import engine_of

    config = load(run_dir)
    ranks = config.launcher.world_size
    calls: Counter[Sent] = Counter()
    elements: Counter[Sent] = Counter()

    class SecondStep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if config.strategy.kind == "ddp":
                trainer.model_wrapped.register_comm_hook(None, _reduction())

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.noting = noted(calls, elements)
                self.noting.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.noting.__exit__(None, None, None)

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    with fake_world(ranks):
        engine_of(config, ranks).adopt_process_group()
        trainer = assemble(run_dir, config, Rank(0, 0, ranks), io.StringIO())
        trainer.add_callback(SecondStep())
        trainer.train()
        parameters = parameter_count(trainer.model)
    found = (Collectives(sent, n, elements[sent] / parameters) for sent, n in calls.items())
    return sorted((c for c in found if c.per_parameter > 0.001), key=lambda c: c.sent)


def freeze(strategy: str, run_dir: Path) -> None:
    """Compose the run of one strategy and create its directory."""
    from omegaconf import OmegaConf

    from shardwright.launchers.composition.compose import compose
    from shardwright.launchers.machine import directories
    from shardwright.launchers.machine import facts as machine
    from shardwright.train.config import from_tree

    (job,) = compose([*RUN, f"strategy={strategy}", *STRATEGIES[strategy]])
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), machine.detect(os.environ), str(run_dir))
    directories.create(config, run_dir)


def counted(strategy: str, directory: Path) -> list[Collectives]:
    """Count in a process of its own. Raises CalledProcessError."""
    run_dir = directory / strategy
    freeze(strategy, run_dir)
    argv = [sys.executable, "-m", "benchmarks.collectives", "--count", str(run_dir)]
    ended = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    return [Collectives(Sent(*c["sent"]), c["calls"], c["per_parameter"]) for c in found]


def table(found: Mapping[str, Sequence[Collectives]]) -> str:
    """Return the rows for people, in Markdown. Pure."""
    lines = [
        "| Strategy | Collectives of a rank in a step of two micro-batches | Sent | The paper's "
        "| Bytes sent |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strategy, collectives in found.items():
        parts = [
            f"{c.calls} {c.sent.name}{'s' * (c.calls > 1)} over {c.sent.ranks:,} ranks of "
            f"{c.per_parameter:.2f} Ψ in {c.sent.dtype}"
            for c in collectives
        ]
        sent = sum(c.volume for c in collectives)
        sent_bytes = sum(c.volume_bytes for c in collectives)
        lines.append(
            f"| `{strategy}` | {'; '.join(parts)} | {sent:.1f} Ψ | {of_the_paper(strategy):.1f} Ψ "
            f"| {sent_bytes:.1f} Ψ |"
        )
    return "\n".join(lines)


def figures(found: Mapping[str, Sequence[Collectives]]) -> dict[str, Any]:
    """Return what is sent in the model's parameters, and the paper's volume over it. Pure."""
    sent = {name: sum(c.volume for c in collectives) for name, collectives in found.items()}
    strategies = {
        name: {"sent": volume, "paper": of_the_paper(name), "ratio": of_the_paper(name) / volume}
        for name, volume in sent.items()
    }
    return {
        "benchmark": "collectives",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "none", "ranks": RANKS},
        "strategies": strategies,
        "ratio": min(each["ratio"] for each in strategies.values()),
    }


def main(arguments: Sequence[str]) -> int:
    """Count every strategy and put the table into the documentation, or count one run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--count", type=Path, metavar="RUN_DIR", help="this one, as JSON")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write figures here, and leave the page alone"
    )
    asked = parser.parse_args(arguments)
    if asked.count is not None:
        found = count(asked.count)
        print(json.dumps([{**asdict(c), "sent": list(c.sent)} for c in found]), flush=True)
        os._exit(0)  # a world of fakes has nobody to leave
    with tempfile.TemporaryDirectory() as directory:
        found_by_strategy = {name: counted(name, Path(directory)) for name in STRATEGIES}
    rows = table(found_by_strategy)
    print(rows)
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures(found_by_strategy), indent=2) + "\n")
        return 0
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{rows}\n\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
