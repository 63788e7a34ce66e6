"""MFU, where counted FLOPs and a device's peak are known, and what a bar tells of a run."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.config import from_tree
from shardwright.train.config.devices import option_of, peak_flops
from shardwright.train.console import progress
from shardwright.train.loop.callbacks.progress import facts
from shardwright.train.model import flops
from tests.screens import screen
from tests.unit import trees


class Gpt2:
    """A model's sizes, and nothing that would have to be built."""

    class config:
        num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 64

    def get_output_embeddings(self) -> object:
        return object()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        flops, "matmul_parameters", lambda model, frozen=False: 0 if frozen else 1000
    )
    return Gpt2()


def run(**sections: Any) -> Any:
    return from_tree({**trees.TREE, "run_dir": "/r", **sections})


def test_the_share_of_the_peak_of_all_ranks(model: Any) -> None:
    cost = flops.cost(model, run(precision=trees.BF16), "NVIDIA H200", 4)
    assert cost is not None
    assert cost.flops_per_token == 6 * 1000 + 12 * 2 * 4 * 16 * 64
    assert cost.peak_flops == 4 * 989e12
    assert cost.mfu(cost.peak_flops / cost.flops_per_token / 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("precision", "device"),
    [({}, "NVIDIA H200"), (trees.BF16, "NVIDIA RTX 9999"), (trees.BF16, None)],
)
def test_it_is_left_out_where_a_half_is_not_known(
    model: Any, precision: dict[str, Any], device: str | None
) -> None:
    assert flops.cost(model, run(precision=precision), device, 4) is None


def test_a_model_that_names_its_sizes_otherwise_has_none(model: Any) -> None:
    model.config = type("Config", (), {"d_model": 64})
    assert flops.cost(model, run(precision=trees.BF16), "NVIDIA H200", 4) is None


def test_the_peak_is_that_of_the_option_with_the_most_words() -> None:
    assert option_of("NVIDIA H100 PCIe") == "h100_pcie"
    assert option_of("NVIDIA H100 80GB HBM3") == "h100"
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("Tesla K80", "bf16") is None


LOGS = {"loss": 3.12341, "tokens_per_second": 12345.6, "mfu": 0.412, "peak_memory_bytes": 12.3e9}


def test_what_a_bar_tells() -> None:
    assert facts(LOGS) == ["loss 3.1234", "12,346 tokens/s", "MFU 41.2%", "12.3 GB"]
    assert facts(LOGS, least=True) == ["loss 3.1234", "12,346 tokens/s", "MFU 41.2%"]
    assert facts({"loss": 1.0}) == ["loss 1.0000"]
    sent = facts({"loss": 1.0, "tokens_per_second": 2.0, "sent_bytes_per_second": 3.21e9})
    assert sent == ["loss 1.0000", "2 tokens/s", "3.2 GB/s sent"]


@pytest.mark.parametrize(
    ("columns", "last", "missing"),
    [(160, "12.3 GB", "nothing"), (85, "12,346 tokens/s", "MFU"), (72, "loss 3.1234", "tokens/s")],
)
def test_a_bar_has_the_facts_that_there_is_room_for(columns: int, last: str, missing: str) -> None:
    with screen(columns, 24) as seen, progress.shown_on(seen.console):
        # Long since begun, so that no machine's speed decides how wide the rate is.
        shown = progress.begin(
            "training", total=720, unit="step", has_bar_name=False, silent_seconds=1000
        )
        shown.done, shown.facts = 266, facts(LOGS)
        shown.refresh()
        (line,) = seen.lines
        shown.end()
    assert last in line
    assert missing not in line
    assert line.endswith("]"), "none is cut"
    assert "266/720 [16:40<28:26,  3.76s/step" in line
