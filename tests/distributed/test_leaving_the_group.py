"""Ranks leave their process group: no gloo thread is left, no exit aborts, a new group works."""

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data.dataloader import _BaseDataLoaderIter

from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import leave
from shardwright.train.process.leave import gloo_worker_count, leave_process_group
from tests.distributed.jobs import trained
from tests.distributed.pool import free_port
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

TOKENS = torch.arange(8)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}


def torchrun(*arguments: str, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run this file as two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, *arguments]
    return subprocess.run(
        command,
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def two_ranks(*arguments: str) -> list[str]:
    """Run this file as two ranks, without torchrun's own seconds; return what each prints.

    Both have to end well.
    """
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | ENVIRONMENT | group | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    return [out for out, _ in ends]


def batches_held(trainer: Trainer) -> list[str]:
    """Return what still goes through a training's batches."""
    dataset = trainer.get_train_dataloader().dataset
    found = [each for each in gc.get_objects() if issubclass(type(each), _BaseDataLoaderIter)]
    return [type(each).__name__ for each in found if each._dataset is dataset]


def test_workers_that_load_the_data_end_with_the_training(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"max_steps": 2}
    tree["strategy"], tree["launcher"]["nproc_per_node"] = {"kind": "single"}, 1
    # They do so with what goes through the batches. Held by a cycle it would wait for each of them
    # in vain for seconds, as their queues are closed first (torch 2.13, utils/data/dataloader.py).
    assert ranks(1)(trained, frozen_run(tree), batches_held) == [[]]


@pytest.mark.slow  # the shared workers of other tests do so all the time, and count threads
def test_strategies_follow_each_other_in_the_same_processes() -> None:
    strategies = ["ddp", "zero2", "zero3", "fsdp", "zero1_bf16", "ddp"]

    ended = torchrun("train", *(f"{strategy}:{free_port()}" for strategy in strategies))

    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        lines = [line for line in ended.stdout.splitlines() if line.startswith(f"rank {rank}:")]
        assert lines == [f"rank {rank}: {name} left 0 threads" for name in strategies]


def test_a_thread_that_used_a_group_of_its_own_leaves_it_too() -> None:
    for said in two_ranks("background", *(str(free_port()) for _ in range(3))):
        assert said.count("the thread is done: True, gloo threads left: 0") == 3


def test_a_default_argument_and_a_mesh_that_captured_the_group_let_it_go() -> None:
    for said in two_ranks("capture"):
        assert "held after destroy: True, after leaving: False" in said


def test_a_failed_rank_leaves_without_a_peer_that_never_answers() -> None:
    ended = torchrun("fail", timeout_seconds=90)

    assert ended.returncode == 1
    assert "ValueError: rank 0 gives up" in ended.stderr
    assert "a collective is still in flight 2 s after training ended" in ended.stderr
    assert "exitcode  : 1 " in ended.stderr


def test_a_failed_rank_reports_and_leaves_though_its_group_never_can(
    tiny_tree: TreeOf, frozen_run: Freeze
) -> None:
    """What blocks here for good is a stand-in for NCCL, which waits for peers in a collective."""
    run_dir = frozen_run(tiny_tree("clm"))

    ended = torchrun("blocked", str(run_dir), timeout_seconds=120)

    log = (run_dir / "logs" / "rank-1.log").read_text()
    assert "the group is being destroyed, and the failure is noted: True" in log
    assert "ValueError: rank 1 gives up" in log
    assert "exitcode  : 1 " in ended.stderr  # and not what a signal makes of it
    assert ended.returncode == 1


def test_no_exit_aborts_when_the_workers_are_late_to_drop_their_collectives() -> None:
    for _ in range(3):  # without leaving, most such runs abort
        two_ranks("late")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("strategy", "runs"), [("ddp", 100), ("zero2", 40), ("fsdp", 40)])
def test_short_runs_never_abort_as_they_exit(strategy: str, runs: int) -> None:
    failed = []
    for _ in range(runs):
        ended = torchrun("train", f"{strategy}:{free_port()}")
        if ended.returncode != 0:
            failed.append(ended.stderr)

    assert not failed, f"{len(failed)} of {runs} runs: {failed[0]}"


# What follows runs in the ranks.


def run_two_steps(strategy: str) -> None:
    """Build and train a GPT-2 of a few thousand weights; all that it holds dies with this frame."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    if strategy == "fsdp":
        run_fully_sharded(model)
    else:
        run_trainer(model, strategy)


def run_fully_sharded(model: torch.nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(input_ids=TOKENS[None], labels=TOKENS[None]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run_trainer(model: torch.nn.Module, strategy: str) -> None:
    from transformers import Trainer, TrainingArguments

    from shardwright.train.strategy.zero.engine import Zero

    if strategy != "ddp":
        Zero.adopt_process_group()
    stage = None if strategy == "ddp" else int(strategy[4])
    zero: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }
    if strategy.endswith("_bf16"):  # with gradients summed in fp32 it has an optimizer of its own
        zero |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=1,
            use_cpu=True,
            bf16=strategy.endswith("_bf16"),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            deepspeed=None if stage is None else zero,
        )
        samples = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
        trainer = Trainer(model=model, args=arguments, train_dataset=samples)
        trainer.train()
    engine: Any = trainer.model_wrapped
    if stage is None:
        assert type(engine).__name__ == "DistributedDataParallel"
    else:
        assert engine.zero_optimization_stage() == stage


def train_one_after_another(runs: list[str]) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each group has a store of its own
    for run in runs:
        strategy, os.environ["MASTER_PORT"] = run.split(":")
        run_two_steps(strategy)
        assert gloo_worker_count() > 0
        leave_process_group()
        left = gloo_worker_count()
        sys.stdout.write(f"rank {os.environ['RANK']}: {strategy} left {left} threads\n")


def capture_the_group_in_a_default_argument() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    import torch.distributed.nn.functional as captures  # its defaults are evaluated right here

    # As something in torch 2.11 holds each mesh that an operator has met.
    mesh = init_device_mesh("cpu", (2,))
    dist.barrier()  # a worker that has not run yet has no name to count it by
    dist.destroy_process_group()
    held = gloo_worker_count() > 0
    leave_process_group()
    assert mesh.ndim == 1, "it is still there"
    assert captures.broadcast.__defaults__ == (None,)
    sys.stdout.write(f"held after destroy: {held}, after leaving: {gloo_worker_count() > 0}\n")


def leave_while_a_thread_writes() -> None:
    """Leave as `group.join` does, while a background save talks to its peers."""
    from shardwright.train.loop.saving.background import finish_writing

    dist.init_process_group("gloo")
    saving = begin_to_write()
    for _ in range(20):  # the training's own collectives, beside those of the thread
        dist.all_reduce(torch.ones(1000))
    finish_writing(60)
    done = saving.is_done
    saving.wait()  # raises what went wrong
    leave_process_group()
    sys.stdout.write(f"the thread is done: {done}, gloo threads left: {gloo_worker_count()}\n")


def begin_to_write() -> Any:
    from shardwright.train.loop.saving.background import Background
    from shardwright.train.loop.saving.peers import Peers

    peers = Peers(int(os.environ["RANK"]))

    def write() -> None:
        for _ in range(3):
            time.sleep(0.3 * (1 + peers.rank))
            found = peers.collect(lambda: torch.ones(1000))
            assert len(found) == (2 if peers.is_first else 0)

    return Background(write)


def end_while_workers_wait_for_the_gil() -> None:
    dist.init_process_group("gloo")
    import torch.distributed.nn.functional  # holds the group, as deepspeed.comm does

    sys.setswitchinterval(10)
    tensors = [torch.ones(4) for _ in range(64)]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
    del work
    leave_process_group()


def fail_with_a_collective_in_flight() -> None:
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        dist.recv(torch.zeros(1), src=0)  # never sent: this rank takes no part in anything else
    try:
        dist.all_reduce(torch.zeros(1), async_op=True)
        raise ValueError("rank 0 gives up")
    finally:
        leave_process_group(timeout_seconds=2)


def fail_in_a_group_that_cannot_be_left(run_dir: str) -> None:
    from shardwright.train.loop.trainer import Trainer

    def fail(*arguments: Any, **settings: Any) -> None:
        raise ValueError("rank 1 gives up")

    def block() -> None:
        is_noted = (Path(run_dir) / "logs" / "rank-1.error.json").exists()
        sys.stdout.write(f"the group is being destroyed, and the failure is noted: {is_noted}\n")
        sys.stdout.flush()
        threading.Event().wait()

    if os.environ["RANK"] == "1":
        Trainer.training_step = fail  # type: ignore[method-assign, assignment]
    dist.destroy_process_group = block  # type: ignore[assignment]
    leave.TIMEOUT_SECONDS = 2
    sys.argv = ["train", run_dir]
    runpy.run_module("train", run_name="__main__")


if __name__ == "__main__":
    match sys.argv[1]:
        case "train":
            train_one_after_another(sys.argv[2:])
        case "capture":
            capture_the_group_in_a_default_argument()
        case "background":
            for os.environ["MASTER_PORT"] in sys.argv[2:]:
                leave_while_a_thread_writes()
        case "late":
            end_while_workers_wait_for_the_gil()
        case "fail":
            fail_with_a_collective_in_flight()
        case "blocked":
            fail_in_a_group_that_cannot_be_left(sys.argv[2])
