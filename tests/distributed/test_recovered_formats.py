"""What other programs left behind reads as what their engines held: bit for bit, in each format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwright.train.checkpoint.format.lazy import PortableState
from shardwright.train.checkpoint.read import portable
from tests.distributed import foreign
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed

Written = Callable[[int], Path]
KINDS = {1: ("odd",), 2: ("mlm", "odd"), 4: ("clm", "mlm", "odd")}
"""By world size, the models that are trained by every engine."""
WORLD_SIZES = [1, 2, pytest.param(4, marks=pytest.mark.slow)]
SECOND = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def by_deepspeed(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function from a world size to the folder of its checkpoints, made once."""
    made: dict[int, Path] = {}

    def write(world_size: int) -> Path:
        if world_size not in made:
            made[world_size] = tmp_path_factory.mktemp(f"deepspeed-{world_size}")
            jobs = [(engine, kind) for engine in foreign.ENGINES for kind in KINDS[world_size]]
            ranks(world_size)(foreign.deepspeed_checkpoints, made[world_size], jobs)
        return made[world_size]

    return write


def check(checkpoint: Path, *, tells_buffers: bool = True) -> PortableState:
    """Read a checkpoint and compare it with what was held when it was written."""
    held, state = torch.load(checkpoint / foreign.HELD), portable.read(checkpoint)
    weights, buffers = dict(state.weights), dict(state.buffers)
    if not tells_buffers:
        weights |= buffers
        buffers = {name: weights.pop(name) for name in held["buffers"]}
    # A tied weight may stand under one of its names.
    assert set(held["weights"]) - set(held["tied"]) <= set(weights) <= set(held["weights"])
    assert set(buffers) == set(held["buffers"])
    for name, tensor in {**weights, **buffers}.items():
        expected = {**held["weights"], **held["buffers"]}[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.whole(), expected), name
    return state


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("engine", foreign.ENGINES)
def test_a_checkpoint_of_deepspeed_holds_the_masters_of_its_engine(
    engine: str, world_size: int, by_deepspeed: Written
) -> None:
    for kind in KINDS[world_size]:
        checkpoint = by_deepspeed(world_size) / f"{engine}-{kind}"
        state = check(checkpoint)
        assert state.step == foreign.STEPS
        of = {"stage": foreign.ENGINES[engine]["stage"], "s": "s" * (world_size > 1)}
        if of["stage"] == 0:
            assert state.origin == "DeepSpeed without ZeRO (stage 0)"
        else:
            assert state.origin == "DeepSpeed ZeRO stage {stage}, {n} rank{s}".format(
                n=world_size, **of
            )
        trained = {t.dtype for n, t in state.weights.items() if n in state.moments}
        assert trained == ({torch.float32} if of["stage"] else set())
        for name, kept in torch.load(checkpoint / foreign.HELD)["tied"].items():
            assert state.weights[name] == state.weights[kept]
        folder = checkpoint / f"global_step{foreign.STEPS}"
        assert portable.read(folder).weights == state.weights


@pytest.mark.parametrize("world_size", SECOND)
def test_deepspeeds_own_script_finds_the_same(
    world_size: int, by_deepspeed: Written, ranks: RanksOf
) -> None:
    # It fails on stage 0 and on the optimizer of bf16 at stage 1.
    engines = [n for n, e in foreign.ENGINES.items() if e["stage"] and "bf16_optimizer" not in n]
    checkpoints = [by_deepspeed(world_size) / f"{engine}-odd" for engine in engines]
    ranks(1)(foreign.by_zero_to_fp32, checkpoints)
    for checkpoint in checkpoints:
        state = portable.read(checkpoint)
        for name, merged in torch.load(checkpoint / "by-deepspeed.pt").items():
            found = {**state.weights, **state.buffers}[name].whole()
            assert torch.equal(found.to(merged.dtype), merged), (checkpoint.name, name)


@pytest.mark.parametrize("world_size", SECOND)
@pytest.mark.parametrize(
    "engine", ["zero1_bf16", "zero2_fp32", "zero2_frozen", "zero3_fp32", "zero3_frozen"]
)
def test_a_universal_checkpoint_holds_the_same_masters(
    engine: str,
    world_size: int,
    by_deepspeed: Written,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    source = by_deepspeed(world_size) / f"{engine}-odd"
    output = tmp_path / "global_step2_universal"
    folder = source / f"global_step{foreign.STEPS}"
    ranks(1)(foreign.universal_checkpoint, folder, output, "zero3" not in engine)
    (output / foreign.HELD).write_bytes((source / foreign.HELD).read_bytes())
    state = check(output)
    assert state.origin == "universal checkpoint"
    assert state.step == foreign.STEPS
    assert portable.read(tmp_path).weights == state.weights, "latest_universal leads there"
    of_ranks = portable.read(source)
    for name, moments in of_ranks.moments.items():
        for kind, moment in moments.items():
            assert torch.equal(state.moments[name][kind].whole(), moment.whole())


@pytest.mark.parametrize("world_size", SECOND)
def test_a_distributed_checkpoint_of_any_sections_and_cuts_holds_the_weights(
    world_size: int, ranks: RanksOf, tmp_path: Path
) -> None:
    ranks(world_size)(foreign.distributed_checkpoints, tmp_path, "odd")
    for form in foreign.DISTRIBUTED:
        state = check(tmp_path / f"{form}-odd", tells_buffers=False)
        assert state.origin == "torch distributed checkpoint"
        cut = any(f.run for tensor in state.weights.values() for f in tensor.fragments)
        assert cut == (form in ("columns", "grid") and world_size > 1)
        averages = {n: t for n, t in state.weights.items() if form == "sections"}
        assert state.ema.keys() - state.buffers.keys() == averages.keys()
        for name, tensor in averages.items():
            assert torch.equal(state.ema[name].whole(), tensor.whole() * 0.5)


@pytest.mark.parametrize("world_size", SECOND)
@pytest.mark.parametrize("library", foreign.LIBRARIES)
@pytest.mark.parametrize(
    "kind", ["odd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("clm", "mlm"))]
)
def test_a_checkpoint_of_accelerate_or_the_trainer_holds_the_masters_of_its_engine(
    library: str, kind: str, world_size: int, ranks: RanksOf, tmp_path: Path
) -> None:
    if world_size == 1 and "fsdp" in library:
        pytest.skip("accelerate takes FSDP on one rank for no FSDP")
    checkpoint = tmp_path / f"{library}-{kind}"
    ranks(world_size)(foreign.library_checkpoint, checkpoint, library, kind)
    if library.startswith("trainer"):
        checkpoint = checkpoint / f"checkpoint-{foreign.STEPS}"
    state = check(checkpoint, tells_buffers="zero" in library)
    assert {t.dtype for t in state.weights.values()} == {torch.float32}
    has_step = library not in ("accelerate_ddp", "accelerate_fsdp_full")
    assert state.step == (foreign.STEPS if has_step else None)
    if library in ("accelerate_fsdp", "trainer_fsdp"):
        assert {"exp_avg", "exp_avg_sq"} == set().union(*state.moments.values())
        assert state.moments.keys() <= state.weights.keys()
