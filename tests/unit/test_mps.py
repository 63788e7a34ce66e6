"""An Apple GPU: what is refused on it by name, and what a run on it comes to.

None is here: its device is a stand-in, and nothing of it was computed on hardware.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import training_args

from shardwright.launchers.machine import facts
from shardwright.launchers.machine.facts import Machine, lacking, resolve
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.model import compilation
from shardwright.train.process.doubles import device_of_sums, doubled
from tests.unit.trees import BF16, TREE

MAC = Machine(cores=8, has_mps=True, torch_has_cuda=False)
MPS = {"launcher": {"kind": "local", "device": "mps"}, "strategy": {"kind": "single"}}


def run(**sections: Any) -> RunConfig:
    return from_tree({**TREE, **MPS, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"strategy": {"kind": "ddp"}, "launcher": {"kind": "torchrun", "device": "mps"}},
            "strategy.kind=ddp divides work among ranks, but launcher.device=mps is one Apple GPU, "
            "whose tensors none of torch's collectives moves; set strategy=single",
        ),
        (
            {"precision": {"compute_dtype": "fp16"}},
            "precision.compute_dtype=fp16 needs an NVIDIA GPU, but launcher.device=mps; choose "
            "precision=bf16 or precision=fp32",
        ),
        (
            {"precision": {**BF16, "fp8_recipe": "tensorwise"}},
            "precision.fp8_recipe=tensorwise needs an NVIDIA GPU, but launcher.device=mps; choose "
            "precision=bf16",
        ),
        (
            {"precision": {"allow_tf32": True}},
            "precision.allow_tf32=true needs an NVIDIA GPU, but launcher.device=mps; choose "
            "precision=fp32",
        ),
        (
            {"trainer": {**TREE["trainer"], "optimizer": "adamw_8bit"}},
            "trainer.optimizer=adamw_8bit has kernels for CPUs and NVIDIA GPUs alone, but "
            "launcher.device=mps; set trainer.optimizer=adamw",
        ),
        (
            {"trainer": {**TREE["trainer"], "compile": True}},
            "trainer.compile=true: torch 2.13 calls its compiler for Apple GPUs a prototype, and "
            "launcher.device=mps has no test with it; set trainer.compile=false",
        ),
        (
            {"trainer": {**TREE["trainer"], "dataloader_workers": 2}},
            "trainer.dataloader_workers=2: a loader's processes learn who tells them to stop from "
            "Linux's kernel alone, but launcher.device=mps is a Mac; set "
            "trainer.dataloader_workers=0",
        ),
        (
            {"trainer": {**TREE["trainer"], "micro_batch_size": "auto"}},
            "trainer.micro_batch_size=auto: the plan knows no Apple GPU (launcher.device=mps); "
            "give a number",
        ),
    ],
)
def test_what_it_has_no_way_for_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        run(**sections)
    assert message in str(refused.value)


def test_gloo_moves_none_of_its_tensors() -> None:
    """The day this fails, strategy=ddp may have a way there."""
    assert "mps" not in dist.Backend.backend_capability[dist.Backend.GLOO]


def test_another_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run()
    assert lacking("mps", 1, config.precision, MAC) == []
    monkeypatch.setattr(facts.platform, "system", lambda: "Linux")
    monkeypatch.setattr(facts.platform, "machine", lambda: "x86_64")
    assert lacking("mps", 1, config.precision, Machine()) == [
        "launcher.device=mps, but this machine is no Mac with an Apple GPU (Linux, x86_64); choose "
        "launcher.device=cpu or auto"
    ]
    assert not facts.detect({}).has_mps


def test_a_run_on_it_is_one_rank_that_compiles_nothing_by_itself() -> None:
    found = resolve(run(), MAC, "/runs/a")
    assert (found.launcher.device, found.launcher.world_size) == ("mps", 1)
    model: Any = None
    settled, said = compilation.settled(found, model)
    assert (settled.trainer.compile, said) == (False, None)
    # Nobody gets it unasked: it was not tried.
    assert resolve(run(launcher={"kind": "local"}), MAC, "/runs/a").launcher.device == "cpu"


def test_transformers_takes_it_where_nothing_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training_args, "is_torch_mps_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True, raising=False)
    asked: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none"}
    assert transformers.TrainingArguments(use_cpu=False, **asked).device.type == "mps"


def test_sums_in_float64_lie_in_host_memory() -> None:
    """MPS has no float64; a GPU's and a CPU's lie where their values do."""
    assert device_of_sums(torch.device("mps")) == torch.device("cpu")
    assert device_of_sums(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert doubled(torch.tensor([1, 2])).dtype == torch.float64
