"""Whole weights are read from safetensors and from what torch.save writes, whoever named them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable
from shardwright.train.checkpoint.read import portable

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(4).to(torch.bfloat16),
    "b.empty": torch.zeros(0, 2),
    "b.number": torch.tensor(2.5, dtype=torch.float64),
}
COUNTS = {"b.counts": torch.arange(3)}


def holds(state: PortableState, tensors: dict[str, torch.Tensor]) -> None:
    assert state.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state.weights[name].dtype == tensor.dtype
        assert torch.equal(state.weights[name].whole(), tensor)


def test_a_file_of_safetensors(tmp_path: Path) -> None:
    save_file({**TENSORS, **COUNTS}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        state = portable.read(path)
        holds(state, TENSORS)
        assert torch.equal(state.buffers["b.counts"].whole(), COUNTS["b.counts"])
        assert (state.origin, state.step) == ("safetensors", None)


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_several_files_with_an_index(suffix: str, tmp_path: Path) -> None:
    first, *rest = TENSORS
    files = {"part-1." + suffix: {first}, "part-2." + suffix: set(rest)}
    for file, names in files.items():
        part = {name: TENSORS[name] for name in names}
        if suffix.endswith("bin"):
            torch.save(part, tmp_path / file)
        else:
            save_file(part, tmp_path / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (tmp_path / f"{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    holds(portable.read(tmp_path), TENSORS)


def test_what_transformers_saves(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=6, n_layer=1, n_head=1, n_positions=4))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    holds(portable.read(tmp_path), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "iter_num": 7, "config": {"dropout": 0.1}},
        lambda state: {"state_dict": state, "global_step": 7, "callbacks": {}},
        lambda state: {"module": {f"module.{n}": t for n, t in state.items()}, "step": 7},
        lambda state: {f"_orig_mod.module.{n}": torch.nn.Parameter(t) for n, t in state.items()},
        lambda state: {n.replace(".", "._checkpoint_wrapped_module."): state[n] for n in state},
    ],
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model_fsdp.bin", "last.pth"])
def test_what_torch_saves(
    file: str, wrap: Callable[[dict[str, torch.Tensor]], Any], tmp_path: Path
) -> None:
    saved = wrap(TENSORS)
    torch.save(saved, tmp_path / file)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "rng_state.pth")
    torch.save({}, tmp_path / "training_args.bin")
    for path in (tmp_path, tmp_path / file):
        state = portable.read(path)
        holds(state, TENSORS)
        assert state.origin == "torch.save"
        assert state.step == (7 if {"iter_num", "global_step", "step"} & saved.keys() else None)


def test_an_average_is_told_from_the_weights(tmp_path: Path) -> None:
    average = {f"module.{name}": tensor * 0.5 for name, tensor in TENSORS.items()}
    torch.save({"model": TENSORS, "ema": average}, tmp_path / "last.pt")
    state = portable.read(tmp_path)
    holds(state, TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(state.ema[name].whole(), tensor * 0.5)


def test_tied_weights_lie_at_one_place(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    torch.save({"in.weight": weight, "out.weight": weight}, tmp_path / "model.pt")
    weights = portable.read(tmp_path).weights
    assert weights["in.weight"] == weights["out.weight"]


def test_a_part_of_a_larger_tensor_is_read_alone(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(4, 3)
    torch.save({"a": rows[1:3], "b": rows[3]}, tmp_path / "model.pt")
    holds(portable.read(tmp_path), {"a": rows[1:3], "b": rows[3]})


# --- refusals -----------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(Unreadable) as error:
        portable.read(path)
    return str(error.value)


def test_a_directory_that_is_no_checkpoint_is_told_what_was_looked_for(tmp_path: Path) -> None:
    assert "Found: nothing" in refusal(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "data").mkdir()
    text = refusal(tmp_path)
    for name in (".metadata", "engine/", "pytorch_model_fsdp_0/", "*_model_states.pt", "latest"):
        assert name in text
    for name in ("zero/*/fp32.pt", "model.safetensors", "pytorch_model.bin", "*.pt"):
        assert name in text
    assert text.endswith("Found: data/, notes.txt")
    assert refusal(tmp_path / "none").endswith("none does not exist")


def test_a_name_in_latest_that_leads_nowhere_or_out_is_refused(tmp_path: Path) -> None:
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    checkpoint.mkdir()
    elsewhere.mkdir()
    torch.save({}, elsewhere / "mp_rank_00_model_states.pt")
    (checkpoint / "latest").write_text("global_step9\n")
    assert "names the folder 'global_step9', which is missing" in refusal(checkpoint)
    for name in ("../elsewhere", str(elsewhere)):
        (checkpoint / "latest").write_text(name)
        assert f"names the folder {name}, which is not in {checkpoint}" in refusal(checkpoint)
    (checkpoint / "global_step9").mkdir()
    (checkpoint / "latest").write_text("global_step9")
    assert "holds neither DeepSpeed's *_model_states.pt nor .metadata" in refusal(checkpoint)
    (checkpoint / "latest").unlink()
    (checkpoint / "global_step8").mkdir()
    assert "holds global_step8, global_step9, and no file latest" in refusal(checkpoint)


def test_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file(TENSORS, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert "and no index that joins them (such as model.safetensors.index.json)" in refusal(
        tmp_path
    )


def test_what_a_desktop_drops_beside_a_file_is_no_weights(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "._consolidated.safetensors").write_bytes(b"of macOS")
    (tmp_path / "._mp_rank_00_model_states.pt").write_bytes(b"of macOS")
    holds(portable.read(tmp_path), {"weight": torch.ones(2)})


def test_the_parts_of_ranks_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model_fsdp_0_rank0.bin")
    assert "pytorch_model_fsdp_0_rank0.bin: a rank's part of the weights" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../other.safetensors"}, "names the file ../other.safetensors, which is not in its"),
        ({"a": "/other.safetensors"}, "names the file /other.safetensors, which is not in its"),
        ({"a": "gone.safetensors"}, "names the file gone.safetensors, which is missing"),
        ({"z": "here.safetensors"}, "here.safetensors does not hold z, as "),
        ([], "is refused: AttributeError"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, reason: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "here.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert reason in refusal(tmp_path)


def header(entry: Any) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a safetensors file, or is truncated"),
        ((2**40).to_bytes(8, "little") + b"{}", "is not a safetensors file, or is truncated"),
        (b"\x02" + bytes(7) + b"[]", "is refused: AttributeError"),
        (b"\x02" + bytes(7) + b"{!", "is refused: JSONDecodeError"),
        (header(ENTRY) + bytes(7), "ends 1 bytes too early"),
        (header({**ENTRY, "shape": [3]}) + bytes(8), "has 8 bytes for a tensor of (3,)"),
        (header({**ENTRY, "shape": [-1, -2]}) + bytes(8), "has 8 bytes for a tensor of (-1, -2)"),
        (header({**ENTRY, "data_offsets": [-8, 0]}) + bytes(8), "has 8 bytes for a tensor of (2,)"),
        (header({**ENTRY, "dtype": "F3"}) + bytes(8), "holds a tensor in F3, which is unknown"),
        (header({"dtype": "F32"}) + bytes(8), "is refused: KeyError"),
    ],
)
def test_a_damaged_file_of_safetensors_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert reason in refusal(tmp_path)


def test_a_file_without_weights_is_told_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": [1]}, tmp_path / "last.pt")
    text = refusal(tmp_path)
    assert "at its top or under model, module, state_dict, model_state_dict" in text
    assert text.endswith("found: epoch, args")


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "last.pt")
    assert "two weights have the same name" in refusal(tmp_path)


# --- other values beside the weights ------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    [
        {"best_val_loss": torch.tensor(3.25)},
        {"rng_state": torch.zeros(8, dtype=torch.uint8), "iter_num": 7},
        {"run": PurePosixPath("runs/a"), "at": datetime.datetime(2026, 1, 2)},
    ],
)
@pytest.mark.parametrize("key", ["model", "net"])
def test_a_value_beside_the_weights_is_not_taken_for_them(
    key: str, beside: dict[str, Any], tmp_path: Path
) -> None:
    torch.save({**beside, key: TENSORS}, tmp_path / "ckpt.pt")
    holds(portable.read(tmp_path), TENSORS)


def test_a_section_can_be_named_where_several_hold_tensors(tmp_path: Path) -> None:
    student = {name: tensor + 1 for name, tensor in TENSORS.items()}
    torch.save({"teacher": TENSORS, "trainer": {"student": student}}, tmp_path / "last.pt")
    text = refusal(tmp_path)
    assert "found: teacher, trainer.student" in text
    assert text.endswith("Name the one to read: --section teacher")
    holds(portable.read(tmp_path, "trainer.student"), student)
    with pytest.raises(Unreadable, match="has no section trainer.nobody: nobody is not among stud"):
        portable.read(tmp_path, "trainer.nobody")


def test_a_section_of_a_distributed_checkpoint_can_be_named(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    dcp.save({"actor": TENSORS, "critic": other}, checkpoint_id=tmp_path, no_dist=True)
    text = refusal(tmp_path)
    assert "sections with tensors: actor, critic. Name the one to read: --section NAME" in (text)
    holds(portable.read(tmp_path, "critic"), other)
    with pytest.raises(Unreadable, match="has no section nobody; it has actor, critic"):
        portable.read(tmp_path, "nobody")


def test_a_section_is_refused_where_there_are_none(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(Unreadable, match=r"has no sections; leave --section=model out"):
        portable.read(tmp_path, "model")


def test_a_transposed_tensor_is_called_that(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(3, 5).T, "b": torch.zeros(1)}, tmp_path / "last.pt")
    assert "of shape (5, 3) that was saved transposed; save it again after .contiguous()" in (
        refusal(tmp_path)
    )
    torch.save({"a": torch.randn(3, 5)[:, 1:]}, tmp_path / "last.pt")
    assert "of shape (3, 4) with gaps in it" in refusal(tmp_path)


def test_a_class_is_refused_with_a_way_that_runs_nothing_here(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "fraction": Fraction(1, 3)}, tmp_path / "last.pt")
    text = refusal(tmp_path)
    assert "GLOBAL fractions.Fraction" in text
    assert text.endswith("load it with weights_only=False and save its weights alone")
    assert "safe_globals" not in text, "torch's own advice is to let it run"


# --- safetensors that several ranks wrote ---------------------------------------------------------


def sharded(directory: Path, cuts: dict[str, list[tuple[list[int], torch.Tensor]]]) -> None:
    """Write what torch's HuggingFaceStorageWriter does: a file for each rank, with places."""
    directory.mkdir(exist_ok=True)
    for rank in range(max(map(len, cuts.values()))):
        mine = {name: parts[rank] for name, parts in cuts.items() if rank < len(parts)}
        places = {name: {"saved_offsets": offsets} for name, (offsets, _) in mine.items()}
        save_file(
            {name: tensor.contiguous() for name, (_, tensor) in mine.items()},
            directory / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"},
        )


def test_safetensors_of_several_ranks_are_joined(tmp_path: Path) -> None:
    rows, columns, whole = torch.randn(5, 4), torch.randn(3, 6), torch.randn(7)
    sharded(
        tmp_path,
        {
            "rows": [([0, 0], rows[:3]), ([3, 0], rows[3:])],
            "columns": [([0, 0], columns[:, :2]), ([0, 2], columns[:, 2:])],
            "whole": [([0], whole)],
        },
    )
    state = portable.read(tmp_path)
    holds(state, {"columns": columns, "rows": rows, "whole": whole})
    assert state.origin == "safetensors in 2 shards"


def test_what_torch_itself_shards(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.numel()}
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    assert [path.name for path in tmp_path.iterdir()] == [
        "shard-00001-model-00001-of-00001.safetensors"
    ]
    holds(portable.read(tmp_path), tensors)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    rows = torch.randn(6, 4)
    parts = [([start, 0], rows[start : start + 2]) for start in (0, 2, 4)]
    sharded(tmp_path, {"rows": parts})
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    assert "elements 8 to 16 of a tensor of 24 are in no file" in refusal(tmp_path)
    save_file({"rows": rows}, tmp_path / "shard-00002-model-00001-of-00001.safetensors")
    assert "does not tell where its tensors belong (KeyError: 'DCP_SHARDING_INFO')" in (
        refusal(tmp_path)
    )
