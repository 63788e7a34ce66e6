"""No format of another program gets code to be run, nor a file from elsewhere to be read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardwright.train.checkpoint.format.lazy import Unreadable
from shardwright.train.checkpoint.read import portable
from tests.faults.untrusted import FORMATS, Payload

Write = Callable[[Any], bytes]
WEIGHT = torch.arange(6.0).view(2, 3)


def refusal(path: Path) -> str:
    with pytest.raises(Unreadable) as error:
        portable.read(path)
    return str(error.value)


def plain(directory: Path, value: Any, write: Write) -> None:
    (directory / "pytorch_model.bin").write_bytes(write({"a": value}))


def beside_weights(directory: Path, value: Any, write: Write) -> None:
    (directory / "last.ckpt").write_bytes(write({"state_dict": {"a": WEIGHT}, "args": value}))


def with_an_index(directory: Path, value: Any, write: Write) -> None:
    (directory / "part.bin").write_bytes(write({"a": value}))
    index = {"weight_map": {"a": "part.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def of_fsdp(directory: Path, value: Any, write: Write) -> None:
    (directory / "pytorch_model_fsdp.bin").write_bytes(write(value))


def deepspeed_states(**values: Any) -> dict[str, Any]:
    return {
        "module": {"a": WEIGHT},
        "buffer_names": [],
        "param_shapes": [{"a": WEIGHT.shape}],
        "shared_params": {},
        "dp_world_size": 1,
        **values,
    }


def save_universal(directory: Path) -> Path:
    """Write what ds_to_universal makes of a model of one weight; return the weight's folder."""
    folder = directory / "zero/a"
    folder.mkdir(parents=True)
    torch.save(deepspeed_states(), directory / "mp_rank_00_model_states.pt")
    torch.save({"param": WEIGHT, "cat_dim": 0, "vocab_tensor": True}, folder / "fp32.pt")
    return folder


def universal_weight(directory: Path, value: Any, write: Write) -> None:
    (save_universal(directory) / "fp32.pt").write_bytes(write({"param": value, "cat_dim": 0}))


def universal_step(directory: Path, value: Any, write: Write) -> None:
    (save_universal(directory) / "step.pt").write_bytes(write(value))


def universal_model(directory: Path, value: Any, write: Write) -> None:
    save_universal(directory)
    states = deepspeed_states(client=value)
    (directory / "mp_rank_00_model_states.pt").write_bytes(write(states))


def frozen_weight(directory: Path, value: Any, write: Write) -> None:
    for rank in range(2):
        states = deepspeed_states(
            dp_world_size=2,
            frozen_param_shapes={"b": torch.Size([4])},
            frozen_param_fragments={"b": value if rank == 1 else torch.zeros(2)},
        )
        data = write(states) if rank == 1 else FORMATS[0](states)
        (directory / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_bytes(data)
        optimizer = {"fp32_flat_groups": [torch.zeros(3)], "partition_count": 2}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, directory / name)


def offloaded_optimizer(directory: Path, value: Any, write: Write) -> None:
    torch.save(deepspeed_states(), directory / "mp_rank_00_model_states.pt")
    state = {"single_partition_of_fp32_groups": [WEIGHT.flatten()], "loss_scaler": value}
    path = directory / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(write({"optimizer_state_dict": state}))


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    "place",
    [
        *(plain, beside_weights, with_an_index, of_fsdp, frozen_weight, offloaded_optimizer),
        *(universal_weight, universal_step, universal_model),
    ],
)
def test_code_in_any_file_is_refused(
    place: Callable[[Path, Any, Write], None], write: Write, tmp_path: Path
) -> None:
    checkpoint, mark = tmp_path / "checkpoint", tmp_path / "mark"
    checkpoint.mkdir()
    place(checkpoint, Payload(mark), write)
    text = refusal(checkpoint)
    assert " is refused: " in text
    # A tensor in a bare pickle is itself a call, and may come first.
    assert "posix.mkdir" in text or "torch.storage._load_from_bytes" in text
    assert not mark.exists()


@pytest.mark.parametrize("folder", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_code_in_the_folders_of_accelerate_is_refused(folder: str, tmp_path: Path) -> None:
    checkpoint, mark = tmp_path / "checkpoint", tmp_path / "mark"
    dcp.save({"model": {"a": WEIGHT}}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")
    optimizer = {"optimizer": {"state": {"a": {"exp_avg": WEIGHT}}}}
    dcp.save(optimizer, checkpoint_id=checkpoint / "optimizer_0")
    state = portable.read(checkpoint)
    assert torch.equal(state.weights["a"].whole(), WEIGHT)
    assert torch.equal(state.moments["a"]["exp_avg"].whole(), WEIGHT)
    (checkpoint / folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    assert ".metadata names posix.mkdir" in refusal(checkpoint)
    assert not mark.exists()


def test_what_programs_save_beside_weights_is_passed_over_and_not_run(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, shape=np.float64(2.0)),
        "rng": ("MT19937", np.arange(4), 0),
    }
    torch.save({"model": {"a": WEIGHT}, **beside}, tmp_path / "last.pt")
    assert torch.equal(portable.read(tmp_path).weights["a"].whole(), WEIGHT)

    mark = tmp_path / "mark"
    hidden = argparse.Namespace(payload=Payload(mark))
    torch.save({"model": {"a": WEIGHT}, "args": hidden}, tmp_path / "last.pt")
    assert "posix.mkdir" in refusal(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("link", ["folder", "file"])
def test_links_out_of_a_universal_checkpoint_are_refused(link: str, tmp_path: Path) -> None:
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    folder = save_universal(checkpoint)
    assert portable.read(checkpoint).weights["a"].shape == WEIGHT.shape
    if link == "folder":
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    else:
        (folder / "fp32.pt").rename(elsewhere)
        (folder / "fp32.pt").symlink_to(elsewhere)
    assert "a link that points out of" in refusal(checkpoint)


def test_a_universal_checkpoint_that_lacks_a_weight_or_has_another_is_refused(
    tmp_path: Path,
) -> None:
    folder = save_universal(tmp_path)
    torch.save(torch.zeros(5), folder / "fp32.pt")
    assert "holds 5 elements, where (2, 3) has 6" in refusal(tmp_path)
    (folder / "fp32.pt").write_bytes(b"")
    assert "fp32.pt is refused" in refusal(tmp_path)
    folder.rename(folder.with_name("b"))
    torch.save({"param": WEIGHT}, folder.with_name("b") / "fp32.pt")
    assert "zero has no a/fp32.pt, nor those of 0 more" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_a_link_out_is_refused(index: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    torch.save({"a": WEIGHT}, tmp_path / "elsewhere.bin")
    os.symlink(tmp_path / "elsewhere.bin", checkpoint / "part.bin")
    (checkpoint / index).write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    assert "names the file part.bin, which is not in its directory" in refusal(checkpoint)
