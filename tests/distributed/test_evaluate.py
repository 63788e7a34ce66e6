"""An evaluation by itself gives the very number that the run has logged, and holds no more."""

from __future__ import annotations

import gc
import io
import shutil
from pathlib import Path

import pytest

from shardwright.launchers import evaluating
from shardwright.launchers.commands import evaluate as command
from shardwright.launchers.machine import facts as machine
from shardwright.train import config as run_config
from shardwright.train.evaluate import measure
from shardwright.train.plan.held import alive
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.run_directory import evaluations
from shardwright.train.strategy.group import join
from tests.distributed.curves import lines
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def evaluated(directory: Path) -> float:
    """Do what `shardwright rank` does in the directory of an evaluation.

    Return what is held of floats then, in bytes for each parameter of the model.
    """
    rank, config = rank_from_environment(), run_config.load(directory)
    with join(config, rank):
        return _evaluated_and_weighed(directory, config, rank)


def _evaluated_and_weighed(directory: Path, config: run_config.RunConfig, rank: Rank) -> float:
    gc.collect()
    before = alive()
    trainer = assemble(directory, config, rank, io.StringIO(), trains=False)
    measure(trainer, io.StringIO())
    gc.collect()
    held = sum(size for storage, size in alive().items() if storage not in before)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    return held / parameters


def bytes_wanted(config: run_config.RunConfig) -> float:
    """Return what weights alone take, for each of the model's parameters."""
    precision, strategy = config.precision, config.strategy
    by_autocast = strategy.kind in ("single", "ddp")
    dtype = precision.master_dtype if by_autocast else precision.compute_dtype
    is_sharded = strategy.kind == "fsdp" or getattr(strategy, "stage", 0) == 3
    return {"fp32": 4, "bf16": 2}[dtype] / (config.launcher.world_size if is_sharded else 1)


def measured(place: Path, step: int | None, ranks: RanksOf, *overrides: str) -> dict[str, float]:
    """Return the metrics of an evaluation, of as many ranks as its config asks for."""
    of, here = evaluating.target(place, step), machine.Machine(cores=2)
    with evaluating.directory_of(of) as directory:
        config, has_own_data = command._config(of, overrides, None, here, directory)
        assert has_own_data
        evaluating.lay_out(directory, config, of, has_own_data=has_own_data)
        held = ranks(config.launcher.world_size)(evaluated, directory)
        # Of a model as small, its smallest parameters and a few constants are whole on each rank.
        assert held == pytest.approx([bytes_wanted(config)] * len(held), rel=0.15)
        found = evaluations.outcome(directory)
        assert found is not None
        assert not (directory / "checkpoints").exists()
        shutil.rmtree(directory)
    return dict(found.metrics)


@pytest.mark.parametrize(
    ("strategy", "objective"),
    [
        *(("zero2", "clm"), ("fsdp", "mlm")),
        pytest.param("zero3", "diffusion", marks=pytest.mark.slow),
        *(
            pytest.param(name, "clm", marks=pytest.mark.slow)
            for name in ("ddp", "zero1", "zero3", "zero3_offload", "fsdp_offload")
        ),
    ],
)
def test_a_checkpoint_is_measured_as_the_run_has_measured_it(
    strategy: str,
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    (tmp_path / "prose").mkdir()
    for number in range(8):
        text = f"Of all things that are {number}, some are more than others. " * 9
        (tmp_path / f"prose/{number}.txt").write_text(text)
    tree = tiny_tree(objective)
    tree["data"]["eval_paths"] = {"prose": str(tmp_path / "prose")}
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": "bf16"}
    tree["trainer"] |= {"max_steps": 4, "save_every_steps": 2, "eval_every_steps": 2}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    logged = {line["step"]: line for line in lines(run_dir) if "eval_loss" in line}
    before = sorted(run_dir.rglob("*"))
    for step in (2, 4):
        found = measured(run_dir, step, ranks)
        assert found == {name: logged[step][name] for name in logged[step] if name in found}
        assert {"eval_loss", "eval_perplexity", "eval_loss/prose"} <= found.keys()
        assert ("eval_masked_accuracy" in found) == (objective == "mlm")
    assert sorted(run_dir.rglob("*")) == before, "nothing is written into the run"

    final = measured(run_dir / "final", None, ranks)
    assert final == pytest.approx(found, rel=1e-6)
    alone = measured(run_dir, 4, ranks, "strategy=single", "launcher=local", "precision=bf16")
    assert alone == pytest.approx(found, rel=2e-3), "other sums, in other orders"


def test_what_an_optimizer_has_averaged_is_measured_and_not_what_it_trains(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"], tree["launcher"]["nproc_per_node"] = {"kind": "single"}, 1
    tree["trainer"] |= {
        **{"max_steps": 4, "save_every_steps": 4, "eval_every_steps": 4},
        **{"optimizer": "schedule_free", "lr_scheduler": "constant", "learning_rate": 0.01},
    }
    run_dir = frozen_run(tree)
    ranks(1)(whole_run, run_dir)
    (logged,) = (line["eval_loss"] for line in lines(run_dir) if "eval_loss" in line)
    assert measured(run_dir, 4, ranks)["eval_loss"] == pytest.approx(logged, rel=1e-6)
