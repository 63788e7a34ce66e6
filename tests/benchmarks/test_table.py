"""The table says what was measured, and what was not; the README shows what the table does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.__main__ import BENCHMARKS, OFF, TINY, command, main, measure, why_not
from benchmarks.table import BEGIN, END, NOT_MEASURED, README, ROWS, TABLE, of_readme, page, read

TRAIN_CPU: dict[str, Any] = {
    "benchmark": "train_cpu",
    "date": "2026-01-31",
    "hardware": {"device": "CPU", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "machine": {"cpu": "A processor", "load_average": 0.25},
    "tiny": False,
    "models": {
        "kantaibert": {
            "1": {
                "ratio": 1.9,
                "memory_ratio": 0.6,
                "variants": {
                    "stock": {"spread": 0.04, "tokens_per_second": 100, "peak_memory_bytes": 10},
                    "ours": {"spread": 0.02, "tokens_per_second": 190, "peak_memory_bytes": 6},
                    "a.b=c": {"spread": 0.02, "tokens_per_second": 152, "peak_memory_bytes": 8},
                },
            }
        }
    },
}


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


def test_what_is_measured_has_its_ratio_and_the_rest_says_that_it_is_not() -> None:
    found = cells(page({"train_cpu": TRAIN_CPU}))
    row = ["`train_cpu`", "MLM, 1 rank", "`run_mlm.py`", "1.90", "1.8", "4%", "2026-01-31"]
    assert row in found
    assert ["`train_cpu`", "MLM, 2 ranks", "`run_mlm.py`", NOT_MEASURED, "1.8", "", ""] in found
    assert ["`train_cpu`", "kantaibert, 1 rank", "`a.b=c`", "1.25", "0.75"] in found
    where = ["`train_cpu`", "2026-01-31", "device CPU, cores 2, A processor", "torch 2.13.0", "0.2"]
    assert where in found
    assert sum(NOT_MEASURED in line for line in found) == len(ROWS) - 2


def test_tiny_models_are_no_measurement() -> None:
    assert page({"train_cpu": {**TRAIN_CPU, "tiny": True}}).count("1.90") == 0


def test_the_readme_has_what_is_measured_and_names_the_rest() -> None:
    text = of_readme({"train_cpu": TRAIN_CPU})
    train, save = (row for row in cells(text) if row[0] in ("`train_cpu`", "`save`"))
    assert train[1].startswith("MLM, 1 rank 1.90 (1.8); peak memory, MLM, 1 rank 0.60 (at most")
    assert "; not measured: MLM, 2 ranks, CLM, 1 rank, " in train[1]
    assert train[2] == "2026-01-31"
    assert save[1:] == [NOT_MEASURED, ""]
    assert text.endswith("device CPU, cores 2, A processor; torch 2.13.0.")


def test_the_readme_and_the_table_are_those_of_the_results() -> None:
    """After a change run `python -m benchmarks --table`."""
    results = read()
    made = README.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert made == of_readme(results)
    assert TABLE.read_text() == page(results)


def test_the_newest_figures_of_a_benchmark_count(tmp_path: Path) -> None:
    for name, date in (("a", "2026-02-01"), ("b", "2026-01-01")):
        figures = {"benchmark": "x", "date": date}
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    assert read(tmp_path)["x"]["date"] == "2026-02-01"


def test_figures_of_a_gpu_have_their_speed() -> None:
    figures = {
        "benchmark": "train_gpu",
        "date": "2026-01-31",
        "hardware": {"device": "NVIDIA H200"},
        "models": {
            "gpt2_small": {
                "compared": "single",
                "variants": {"single": {"tokens_per_second": 481_000.4, "ratio": 1.31}},
            }
        },
    }
    (row,) = [row for row in cells(page({"train_gpu": figures})) if row[1] == "125M"]
    assert row[3:5] == ["481,000 tokens/s, 1.31 of its peer", "480,000 tokens/s"]


def test_every_benchmark_is_a_command_with_a_json_file(tmp_path: Path) -> None:
    assert {row.benchmark for row in ROWS} == {benchmark.name for benchmark in BENCHMARKS}
    assert set(TINY) | {"collectives", "train_gpu", "offload_gpu"} == {b.name for b in BENCHMARKS}
    (train,) = [benchmark for benchmark in BENCHMARKS if benchmark.name == "train_cpu"]
    words = command(train, tmp_path / "f.json", Path("scripts"))
    assert words[:3] == [sys.executable, "-m", "benchmarks.train_cpu"]
    assert words[-4:] == ["--examples", "scripts", "--json", str(tmp_path / "f.json")]
    assert set(OFF) <= set(words)


def test_what_does_not_fit_or_has_no_gpu_is_not_begun() -> None:
    gpu = next(benchmark for benchmark in BENCHMARKS if benchmark.needs_gpu)
    assert why_not(gpu, has_gpu=False, left_minutes=99) == "there is no GPU"
    assert why_not(gpu, has_gpu=True, left_minutes=99) is None
    assert why_not(gpu, has_gpu=True, left_minutes=1) == "it takes 12 minutes, and 1 are left"


def test_all_but_a_gpus_fits_into_half_an_hour() -> None:
    assert sum(each.minutes for each in BENCHMARKS if not each.needs_gpu) <= 30


def test_it_measures_and_keeps_the_machine_with_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import __main__

    def writes(benchmark: Any, file: Path, *_: Any, **__: Any) -> list[str]:
        figures = json.dumps({"benchmark": benchmark.name, "ratio": 1.25})
        code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
        return [sys.executable, "-c", code, str(file), figures]

    monkeypatch.setattr(__main__, "command", writes)
    arguments = ["--quick", "--only", "startup", "train_gpu", "--results", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "about 3 minutes on two idle cores, 30 at most" in said
    assert "train_gpu: not measured, there is no GPU" in said
    assert "startup: ratio 1.25" in said
    figures = json.loads((tmp_path / "startup-cpu.json").read_text())
    assert figures["machine"]["cpu"]
    assert [path.name for path in tmp_path.iterdir()] == ["startup-cpu.json"]


def test_one_that_takes_too_long_is_ended_and_one_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import __main__

    words = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    monkeypatch.setattr(__main__, "command", lambda *args, **kwargs: words)
    said = measure(BENCHMARKS[0], tmp_path, None, 1.0, is_tiny=True)
    assert said == "failed (exit code 3)\n  why"
    words[2] = "import time; print('so far', flush=True); time.sleep(600)"
    said = measure(BENCHMARKS[0], tmp_path, None, 2 / 60, is_tiny=True)
    assert said == "failed (killed after 2 s)\n  so far"


def test_marks_of_a_page_stay() -> None:
    assert table.between(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
