"""Plans against live engines: what a case's figures are made of, and how they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import frozen, plan
from benchmarks.plan import CASES, CATEGORIES, Case, measured, overrides, row, said, table, worst
from shardwright.launchers.machine import facts

PLANNED = {"parameters": 101, "gradients": 100, "optimizer": 200, "peak": 1040}
MEASURED = {"parameters": 100, "gradients": 100, "optimizer": 200, "peak": 1000}


def config_of(case: Case, folder: Path) -> Any:
    return frozen.freeze(overrides(case), facts.detect({"CUDA_VISIBLE_DEVICES": ""}), folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_a_run_whose_ranks_have_two_micro_batches(case: Case, tmp_path: Path) -> None:
    config = config_of(case, tmp_path / "run")
    trainer = config.trainer
    assert config.launcher.world_size == case.ranks
    assert trainer.global_batch_size == 2 * trainer.micro_batch_size * case.ranks
    assert config.launcher.device == "cpu"


def test_the_cases_are_of_all_families_and_precisions(tmp_path: Path) -> None:
    configs = [config_of(case, tmp_path / case.name) for case in CASES]
    assert len(CASES) >= 12
    assert {c.model.kind for c in configs} == {"gpt2", "roberta", "llama", "modernbert"}
    assert {c.strategy.kind for c in configs} == {"single", "ddp", "zero", "fsdp"}
    assert {c.precision.master_dtype for c in configs} == {"fp32", "bf16"}
    assert {c.trainer.recomputed_every_blocks is None for c in configs} == {True, False}
    assert {c.launcher.world_size for c in configs} == {1, 2, 4}


def test_the_rank_with_most_counts_category_by_category() -> None:
    ranks = [
        {"parameters": 5, "gradients": 1, "optimizer": 3, "passes": 20, "update": 10},
        {"parameters": 4, "gradients": 2, "optimizer": 3, "passes": 15, "update": 30},
    ]
    assert measured(ranks) == {"parameters": 5, "gradients": 2, "optimizer": 3, "peak": 30}


def test_a_miss_is_a_share_of_what_was_measured(tmp_path: Path) -> None:
    config = config_of(CASES[0], tmp_path / "run")
    found = row(config, PLANNED, MEASURED)
    assert found["missed"] == pytest.approx(
        {"parameters": 0.01, "gradients": 0, "optimizer": 0, "peak": 0.04}
    )
    assert found["is_within"]
    assert not row(config, {**PLANNED, "peak": 1060}, MEASURED)["is_within"]
    assert not row(config, {**PLANNED, "gradients": 97}, MEASURED)["is_within"]


def test_what_is_told_names_the_worst_and_what_failed(tmp_path: Path) -> None:
    config = config_of(CASES[0], tmp_path / "run")
    near, far = row(config, PLANNED, MEASURED), row(config, {**PLANNED, "peak": 900}, MEASURED)
    assert worst({"a": near, "b": far, "c": {"error": "gone"}}) == pytest.approx(0.9)
    assert worst({"c": {"error": "gone"}}) is None
    assert said("a", near) == "a: parameters +1.0%, gradients +0.0%, optimizer +0.0%, peak +4.0%"
    assert said("b", far).endswith("peak -10.0%  (missed)")
    assert said("c", {"error": "gone"}) == "c: failed\ngone"
    results = {
        "cases": {"a": near, "c": {"error": "gone"}},
        "hardware": {"device": "CPU", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-31",
    }
    lines = table(results).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[2][:1] + rows[2][4:8] == ["`a`", "no", "+1.0%", "+0.0%", "+0.0%"]
    assert rows[3] == ["`c`", *["failed"] * (len(rows[0]) - 1)]
    assert lines[-1] == "device CPU, cores 2, torch 2.13.0; 2026-01-31."


def test_the_chapter_keeps_what_stands_around_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, file = tmp_path / "plan.md", tmp_path / "plan-cpu.json"
    page.write_text(f"before\n\n{plan.BEGIN}\n\nold\n\n{plan.END}\n\nbehind\n")
    file.write_text('{"cases": {}, "hardware": {}, "versions": {}, "date": "2026-01-31"}')
    monkeypatch.setattr(plan, "PAGE", page)
    monkeypatch.setattr(plan, "FILE", file)
    assert plan.main(["--table"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n\n{plan.BEGIN}\n")
    assert text.endswith(f"{plan.END}\n\nbehind\n")
    assert "old" not in text
    assert all(category in text for category in CATEGORIES)


def test_only_cases_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.parse(["--only", "zero9"])
    assert ended.value.code == 2
    assert "zero9" in capsys.readouterr().err
