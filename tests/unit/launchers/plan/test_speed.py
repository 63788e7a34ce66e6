"""How long a step and a run take, in numbers worked out by hand."""

from __future__ import annotations

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.candidates import on_hardware
from shardwright.launchers.plan.hardware import Hardware, chosen
from shardwright.launchers.plan.speed import Pace, as_json, compute_seconds, lacking, pace
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.plan.facts import ModelFacts, Parameter, Traced
from tests.unit.launchers.composed import composed

COUNT = 10**9
UNIT = COUNT // 10
MODEL = ModelFacts(
    tuple(
        Parameter(f"matrix {n}", (10_000, 10_000), decays=True, is_hidden_matrix=True)
        for n in range(10)
    ),
    UNIT,
    (UNIT,) * 10,
    fp8_elements=COUNT,
    flops_per_token=6 * COUNT,
)
TOKENS = 2 * 512
"""Of a micro-batch."""
TRACED = Traced(kept=1, forward=1, backward=1, backward_growing=1, flops=6 * COUNT * TOKENS)
EXACT = tuple(f"hardware.{name}_efficiency=1" for name in ("compute", "link", "memory"))


def hardware(*words: str) -> Hardware:
    found = chosen(["hardware=h200x8", *EXACT, *words])
    assert found is not None
    return found


def run(*overrides: str, on: Hardware) -> RunConfig:
    tree, _ = composed(
        *(
            "model=llama_tiny",
            "model.max_position_embeddings=512",
            "precision=bf16",
            "data.sequence_length=512",
            "trainer.max_steps=10",
        ),
        *("trainer.micro_batch_size=2", f"trainer.global_batch_size={4 * on.ranks}"),
        "trainer.max_grad_norm=0",
        *overrides,
    )
    machine = Machine(compute_capabilities=(9.0,) * on.devices, cores=64)
    return resolve(from_tree(on_hardware(tree, on)), machine, "plan")


def of(*overrides: str, on: Hardware | None = None) -> Pace:
    on = on or hardware()
    return pace(run(*overrides, on=on), MODEL, TRACED, on)


PASS = 6 * COUNT * TOKENS / 989e12


def test_arithmetic_is_products_over_the_peak_of_their_dtype() -> None:
    on = hardware()

    def spent(*overrides: str) -> float:
        return compute_seconds(run(*overrides, on=on), MODEL, TRACED, on)

    assert spent() == pytest.approx(PASS)
    assert spent("precision=fp32") == pytest.approx(PASS * 989 / 67)
    assert spent("precision=tf32") == pytest.approx(PASS * 989 / 494)
    # All of these products are of blocks' matrices.
    assert spent("precision=fp8") == pytest.approx(PASS * 989 / 1979)
    kept = spent("precision=fp8", "precision.fp8_recipe=rowwise_with_gw_hp")
    assert kept == pytest.approx(PASS / 3 + PASS * 2 / 3 * 989 / 1979)
    half = hardware("hardware.compute_efficiency=0.5")
    assert compute_seconds(run(on=half), MODEL, TRACED, half) == pytest.approx(2 * PASS)


def test_one_rank_computes_and_updates() -> None:
    on = hardware("hardware.devices=1")
    found = of("strategy=single", on=on)
    # Gradients read, masters and moments read and written: 4 + 2 x 12 bytes over 4.8 TB/s.
    assert found.parts.update == pytest.approx(28 * COUNT / 4.8e12)
    assert found.step_seconds == pytest.approx(2 * PASS + found.parts.update)
    assert found.tokens_per_step == 2 * TOKENS
    assert found.mfu == pytest.approx(6 * COUNT * 2 * TOKENS / found.step_seconds / 989e12)
    clipped = of("strategy=single", "trainer.max_grad_norm=1", on=on)
    assert clipped.parts.update == pytest.approx((28 + 12) * COUNT / 4.8e12)


def test_what_arithmetic_hides_and_what_it_does_not() -> None:
    """4 GB of gradients over NVLink take 15.6 ms, a pass 6.1 ms, two thirds of it backward."""
    slow = 4 * COUNT * 2 * 7 / 8 / 450e9
    found = of("strategy=ddp", f"strategy.bucket_size_bytes={4 * COUNT}")
    (sent,) = found.collectives
    assert sent.seconds == pytest.approx(slow, rel=0.01)  # its hops besides
    found = of("strategy=ddp")
    (sent,) = found.collectives
    assert sent.seconds > 1.2 * slow, "in buckets of 25 MiB"
    hidden = PASS * 2 / 3
    assert found.parts.communication == pytest.approx(sent.seconds - hidden)
    # Ten times the arithmetic hides all but the last bucket.
    slower = hardware("hardware.compute_efficiency=0.1")
    found = of("strategy=ddp", on=slower)
    (sent,) = found.collectives
    assert found.parts.communication == pytest.approx(sent.piece_seconds)
    # DeepSpeed's stage 0 reduces when there is no arithmetic left.
    found = of("strategy=zero0", on=slower)
    assert found.parts.communication == pytest.approx(found.communication_seconds)


def test_on_cpus_nothing_is_hidden() -> None:
    on = chosen(["hardware=cpux4", *EXACT])
    assert on is not None
    found = of("strategy=ddp", "precision=fp32", on=on)
    assert found.parts.communication == pytest.approx(found.communication_seconds)
    assert found.mfu is None


def test_offloaded_states_are_updated_by_the_hosts_memory() -> None:
    found = of("strategy=fsdp_offload")
    assert found.parts.update == pytest.approx(28 * COUNT / 8 / (563e9 / 8))
    # Two micro-batches, each with shards there twice and gradients back, over 64 GB/s.
    assert found.copy_seconds == pytest.approx(2 * 3 * 4 * COUNT / 8 / 64e9)
    nvme = of("strategy=zero3_nvme", "strategy.nvme_path=/tmp")
    assert nvme.parts.copies > 2 * 12 * COUNT / 20e9, "all ranks of a node share its disks"


def test_muon_iterates_beside_adamw() -> None:
    plain = of("strategy=ddp").parts.update
    muon = of("strategy=ddp", "trainer.optimizer=muon").parts.update
    # Ten matrices among eight ranks: a fair share is more than one. Of moments there is one.
    iterations = 5 * 10 / 8 * 2 * 3 * 10_000**3 / 989e12
    assert muon - plain == pytest.approx(iterations - 8 * COUNT / 4.8e12)


def test_many_ranks_of_small_pieces_are_not_free() -> None:
    few, many = hardware("hardware.nodes=2"), hardware("hardware.nodes=512")
    at_few, at_many = of("strategy=fsdp", on=few), of("strategy=fsdp", on=many)
    assert at_many.parts.communication > 2 * at_few.parts.communication
    assert at_many.tokens_per_second / many.ranks < at_few.tokens_per_second / few.ranks


def test_the_run_has_an_end() -> None:
    found = of("strategy=ddp", "trainer.save_every_steps=4")
    assert (found.steps, found.saves) == (10, 3)
    expected = 10 * found.step_seconds + 3 * found.checkpoint.seconds
    assert found.run_seconds == pytest.approx(expected)
    assert found.device_hours == pytest.approx(8 * expected / 3600)
    tokens = ["trainer.max_steps=null", "trainer.max_tokens=163000"]
    assert of(*tokens, "strategy=ddp").steps == 10
    assert of(*tokens, "strategy=ddp", "data.packing=best_fit").steps == 10, "as if all were full"
    epochs = of("trainer.max_steps=null", "trainer.max_epochs=2", "strategy=ddp")
    assert (epochs.steps, epochs.run_seconds, epochs.device_hours) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "of_first", "of_others"),
    [
        (["strategy=ddp"], 12 / 8, 12 / 8),
        (["strategy=fsdp"], 12 / 8, 12 / 8),
        (["strategy=ddp", "trainer.optimizer=muon"], 8 / 8, 8 / 8),
        (["strategy=ddp", "trainer.optimizer=adamw_8bit"], 12 / 8, 12 / 8),
        (["strategy=zero0"], 14, 0),
        (["strategy=zero0", "precision=fp32"], 12, 0),
        (["strategy=zero2"], 2 + 12 / 8, 12 / 8),
        (["strategy=zero3"], 12 / 8, 12 / 8),
    ],
)
def test_a_checkpoint_is_what_its_ranks_write(
    words: list[str], of_first: float, of_others: float
) -> None:
    found = of(*words).checkpoint
    assert found.largest_part_bytes == of_first * COUNT
    assert found.size_bytes == pytest.approx((of_first + 7 * of_others) * COUNT)
    # The first rank's hashing at 2 GB/s, or the disks at 20 GB/s.
    assert found.seconds == pytest.approx(max(of_first / 2, found.size_bytes / COUNT / 20))


def test_a_checkpoint_beside_training_stalls_it_for_a_copy() -> None:
    found = of("strategy=fsdp", "checkpoint.async=true").checkpoint
    assert found.stalled_seconds == pytest.approx(1.5 * COUNT / 64e9)
    assert found.seconds > found.stalled_seconds


def test_hardware_may_lack_a_dtype() -> None:
    v100 = chosen(["hardware=v100x8"])
    assert v100 is not None
    assert lacking(run("precision=bf16", on=v100), v100) == (
        "this hardware has no products in bf16 (hardware.peak_teraflops.bf16=null); "
        "choose precision=fp32 or fp16"
    )
    assert "in tf32" in str(lacking(run("precision=tf32", on=v100), v100))
    assert "in fp8" in str(lacking(run("precision=fp8", on=hardware()), _without_fp8()))
    assert lacking(run("precision=fp16", on=v100), v100) is None


def _without_fp8() -> Hardware:
    return hardware("hardware.peak_teraflops.fp8=null")


def test_everything_is_told() -> None:
    found = of("strategy=zero2")
    told = as_json(found)
    assert told["step_seconds"] == pytest.approx(sum(found.by_category().values()))
    assert [each["name"] for each in told["collectives"]] == ["all-reduce", "all-gather"]  # type: ignore[attr-defined]
