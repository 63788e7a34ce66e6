"""What a plan may suppose of machines: the shipped options, one's own, their words and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shardwright.launchers.plan import hardware
from shardwright.launchers.plan.hardware import CONF, Hardware, Peaks, chosen, of_device, split
from shardwright.train.errors import UserError
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


def of(*words: str, config_dir: Path | None = None) -> Hardware:
    found = chosen(words, config_dir)
    assert found is not None
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_lists_every_key_and_says_where_its_figures_are_from(option: str) -> None:
    path = CONF / f"{option}.yaml"
    tree = yaml.safe_load(path.read_text())
    assert list(tree) == list(Hardware.model_fields)
    assert list(tree["peak_teraflops"]) == list(Peaks.model_fields)
    assert of(f"hardware={option}").ranks == 1
    lines = path.read_text().splitlines()
    figures = [line for line in lines if line.startswith(("memory_", "peak_", "nvlink", "host_"))]
    figures += [line for line in lines if line.startswith(("network", "nvme", "compute", "link"))]
    assert all(line.partition("#")[2] for line in figures)


@pytest.mark.parametrize(
    ("word", "devices", "nodes"),
    [("h200", 1, 1), ("h200x8", 8, 1), ("h200x8x4", 8, 4), ("rtx_4090x2", 2, 1), ("l40sx4", 4, 1)],
)
def test_a_word_says_how_many(word: str, devices: int, nodes: int) -> None:
    found = of(f"hardware={word}")
    assert (found.devices, found.nodes, found.ranks) == (devices, nodes, devices * nodes)


def test_keys_win_over_the_option() -> None:
    found = of("hardware=h200x8", "hardware.nodes=2", "hardware.peak_teraflops.bf16=500")
    assert (found.ranks, found.peak_flops("bf16")) == (16, 500e12)
    assert found.peak_flops("fp8") == of("hardware=h200").peak_flops("fp8")


def test_ranks_on_cpus_share_the_hosts_memory() -> None:
    found = of("hardware=cpux4", "hardware.host_memory_gib=8")
    assert found.memory_bytes == 2 * 2**30
    assert of("hardware=h200x4").memory_bytes == 143_771 * 2**20


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    tree = yaml.safe_load((CONF / "h100.yaml").read_text()) | {"memory_mib": 1000, "devices": 3}
    (tmp_path / "hardware").mkdir()
    path = tmp_path / "hardware" / "minex2.yaml"  # a name that could be taken for a count
    path.write_text(yaml.safe_dump(tree))
    assert of(f"hardware={path}").ranks == 3
    assert of("hardware=minex2", config_dir=tmp_path).ranks == 3
    assert of("hardware=minex2x4x2", config_dir=tmp_path).ranks == 8
    assert of("hardware=h200x2", config_dir=tmp_path).ranks == 2


def test_what_is_for_the_hardware_is_told_from_the_rest() -> None:
    mine, others = split(["model=gpt2_small", "hardware=h200", "+hardware.nodes=2", "a.hardware=1"])
    assert mine == ["hardware=h200", "hardware.nodes=2"]
    assert others == ["model=gpt2_small", "a.hardware=1"]
    assert chosen([]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hardware=h20x8"], "unknown hardware h20x8: did you mean h200? A node of 8 is NAMEx8"),
        (["hardware=abacus"], "unknown hardware abacus: there are a100_40gb, a100_80gb, b200, cpu"),
        (["hardware=h200x0"], "hardware=h200x0: devices and nodes are counted from 1"),
        (["hardware=h200x-8"], "unknown hardware h200x-8: did you mean h200?"),
        (["hardware.nodes=2"], "hardware.nodes=2: of which hardware? Add hardware=NAME"),
        (["hardware=no.yaml"], "hardware=no.yaml: there is no such file"),
        (["hardware=h200", "hardware.memory_mib=-4"], "hardware.memory_mib=-4: must be at least 1"),
        (
            ["hardware=h200", "hardware.host_memory_gib=-1"],
            "hardware.host_memory_gib=-1: must be more than 0",
        ),
        (
            ["hardware=h200", "hardware.compute_efficiency=1.5"],
            "hardware.compute_efficiency=1.5: must be at most 1",
        ),
        (
            ["hardware=h200", "hardware.memory=3"],
            "unknown key hardware.memory=3: did you mean hardware.memory_mib?",
        ),
        (["hardware=h200", "hardware.nodes=["], "hardware.nodes=[: the value cannot be read"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(words)
    assert message in str(error.value)


def test_a_file_that_holds_no_hardware_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="is not a mapping of keys to values"):
        chosen([f"hardware={path}"])
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        chosen([f"hardware={path}"])
    path.write_text("device: cuda\n")
    with pytest.raises(UserError, match=r"hardware\.peak_teraflops is not set"):
        chosen([f"hardware={path}"])


@pytest.mark.parametrize(
    ("name", "memory_mib"),
    [
        ("NVIDIA H100 PCIe", 81_559),
        ("NVIDIA H100 NVL", 95_830),
        ("NVIDIA A100-SXM4-40GB", 40_960),
        ("NVIDIA A100-SXM4-80GB", 81_920),
        ("Tesla V100-SXM2-32GB", 32_510),
    ],
)
def test_a_device_is_known_by_its_name_in_cuda(name: str, memory_mib: int) -> None:
    found = of_device(name)
    assert found is not None
    assert found.memory_mib == memory_mib


def test_a_device_without_a_dtype_has_no_peak_of_it() -> None:
    found = of_device("Tesla V100-SXM2-32GB")
    assert found is not None
    assert found.peak_flops("bf16") is None
    assert found.peak_flops("fp16") == 125e12
    assert of_device("NVIDIA A10") is None


def test_a_run_has_no_hardware(shardwright: Shardwright) -> None:
    for word in ("hardware=h200", "+hardware=h200"):
        outcome = shardwright("train", "--dry-run", word)
        assert outcome.code == 2
        assert "hardware= says on what a plan is made, and this run leaves nothing" in outcome.err
    assert "hardware" not in shardwright("train", "--help").out
    assert set(hardware.options()) == set(OPTIONS)
