"""A checkpoint is data: one that asks for code to be run is refused, whatever its hashes say.

Each is sealed with a manifest that fits, so that only the readers stand in the way.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.loop import resuming
from shardwright.train.process.rank import Rank
from tests.checkpoints import described
from tests.faults.killable import start
from tests.faults.untrusted import FORMATS, Payload, in_legacy_format, in_zip

pytestmark = pytest.mark.distributed

RunOf = Callable[[str], Path]


def seal(checkpoint: Path) -> None:
    """Make the manifest fit the files."""
    manifest = json.loads((checkpoint / layout.MANIFEST).read_text())
    files = described(checkpoint)
    layout.write_manifest(checkpoint, {**manifest, "files": files})
    assert layout.what_is_wrong(checkpoint) is None


def refusal(run_dir: Path) -> str:
    """Return what the user is told when the newest checkpoint is opened, or read."""
    seal(run_dir / "checkpoints/checkpoint-2")
    with pytest.raises(UserError) as error:
        read_everything(run_dir)
    assert "remove it to use an older one" in str(error.value)
    return str(error.value)


def read_everything(run_dir: Path) -> None:
    """Read the tensors of the newest checkpoint in the two ways of a resume."""
    found = resuming.newest(run_dir, Rank(index=0, local_index=0, world_size=1), pytest.fail)
    assert found is not None
    for tensor in [*found.state.weights.values(), *found.state.buffers.values()]:
        with resuming._refusing(found.checkpoint):
            tensor.read()
    with resuming._refusing(found.checkpoint):
        for moments in found.state.moments.values():
            for tensor in moments.values():
                tensor.whole()
        for numbers in found.state.scalars.values():
            assert dict(numbers) == {"step": 2}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    ("strategy", "file"),
    [
        ("zero0", "mp_rank_00_model_states.pt"),
        ("zero1", "mp_rank_00_model_states.pt"),
        ("zero1", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero2", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_code_in_a_file_of_deepspeed_is_refused(
    strategy: str, file: str, write: Callable[[Any], bytes], run_of: RunOf, tmp_path: Path
) -> None:
    run_dir, mark = run_of(strategy), tmp_path / "mark"
    path = run_dir / "checkpoints/checkpoint-2/engine" / file
    assert path.is_file()
    path.write_bytes(write({"module": Payload(mark), "optimizer_state_dict": 1}))
    text = refusal(run_dir)
    assert file in text
    assert "posix.mkdir" in text
    assert not mark.exists()


def test_a_pickle_that_torch_never_writes_is_refused(run_of: RunOf, tmp_path: Path) -> None:
    run_dir, mark = run_of("zero2"), tmp_path / "mark"
    path = run_dir / "checkpoints/checkpoint-2/engine/mp_rank_00_model_states.pt"
    path.write_bytes(pickle.dumps(Payload(mark), protocol=4))
    text = refusal(run_dir)
    assert "mp_rank_00_model_states.pt is refused: it is not a file that torch.save wrote" in text
    assert "weights_only" not in text, "no advice to allow code"
    assert not mark.exists()


def test_tensors_in_the_old_format_of_torch_are_refused(run_of: RunOf) -> None:
    run_dir = run_of("zero0")
    path = run_dir / "checkpoints/checkpoint-2/engine/mp_rank_00_model_states.pt"
    path.write_bytes(in_legacy_format({"module": {"weight": torch.zeros(2)}, "optimizer": None}))
    assert "is in the format of torch before 1.6" in refusal(run_dir)


def test_code_in_the_metadata_of_a_distributed_checkpoint_is_refused(
    run_of: RunOf, tmp_path: Path
) -> None:
    run_dir, mark = run_of("fsdp"), tmp_path / "mark"
    path = run_dir / "checkpoints/checkpoint-2/engine/.metadata"
    sound = pickle.loads(path.read_bytes())
    inside = dataclasses.replace(sound, planner_data=Payload(mark))
    # A path is allowed there, and what a path can do is not.
    touch = b"\x80\x04\x8c\x07pathlib\x8c\x0aPath.touch\x93\x8c\x07pathlib\x8c\x04Path\x93\x8c"
    touch += bytes([len(str(mark))]) + str(mark).encode() + b"\x85R\x85R."
    for data in (pickle.dumps(Payload(mark)), pickle.dumps(inside), touch):
        path.write_bytes(data)
        text = refusal(run_dir)
        assert ".metadata names " in text
        assert "posix.mkdir" in text or "pathlib.Path.touch" in text
        assert not mark.exists()


def with_first_tensor(
    engine: Path, change: Callable[[str, TensorStorageMetadata, Any, Metadata], None]
) -> str:
    """Change what .metadata says of a weight and of where it lies; return the weight's name."""
    path = engine / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items() if "c_attn.w" in i.fqn)
    change(index.fqn, metadata.state_dict_metadata[index.fqn], info, metadata)
    path.write_bytes(pickle.dumps(metadata))
    return index.fqn


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("write", FORMATS)
def test_code_in_a_tensor_of_a_distributed_checkpoint_is_refused(
    strategy: str, write: Callable[[Any], bytes], run_of: RunOf, tmp_path: Path
) -> None:
    run_dir, mark = run_of(strategy), tmp_path / "mark"
    engine = run_dir / "checkpoints/checkpoint-2/engine"

    def append(name: str, described: Any, info: Any, metadata: Metadata) -> None:
        data = write(Payload(mark))
        with (engine / info.relative_path).open("ab") as file:
            info.offset, info.length = file.tell(), len(data)
            file.write(data)

    with_first_tensor(engine, append)
    text = refusal(run_dir)
    assert ".distcp at " in text
    assert "posix.mkdir" in text
    assert not mark.exists()


def _other_dtype(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    described.properties.dtype = torch.int32


def _other_shape(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    described.size = torch.Size([described.size[0], described.size[1] // 2])
    for i, chunk in enumerate(described.chunks):
        sizes = torch.Size([chunk.sizes[0], chunk.sizes[1] // 2])
        described.chunks[i] = dataclasses.replace(chunk, sizes=sizes)


def _beyond_the_file(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    info.offset += 10**9


def _before_the_file(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    info.offset = -5


def _gap(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    del described.chunks[-1]


def _no_place(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    metadata.storage_data = None


def _other_kind(name: str, described: Any, info: Any, metadata: Metadata) -> None:
    del described.chunks


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (_other_dtype, "holds model.transformer.h.0.attn.c_attn.weight in torch.float32, not"),
        (_other_shape, "of model.transformer.h.0.attn.c_attn.weight, not"),
        (_beyond_the_file, "is refused"),
        (_before_the_file, "is refused"),
        (_gap, "elements are in the files"),
        (_no_place, ".metadata is not laid out as torch"),
        (_other_kind, ".metadata is not laid out as torch"),
    ],
)
def test_metadata_that_lies_about_a_tensor_is_refused(
    lie: Callable[..., None], reason: str, run_of: RunOf
) -> None:
    run_dir = run_of("fsdp")
    with_first_tensor(run_dir / "checkpoints/checkpoint-2/engine", lie)
    assert reason in refusal(run_dir)


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_metadata_that_names_a_file_elsewhere_is_refused(
    way: str, run_of: RunOf, tmp_path: Path
) -> None:
    run_dir = run_of("fsdp")
    engine = run_dir / "checkpoints/checkpoint-2/engine"
    elsewhere = tmp_path / "elsewhere.distcp"

    def lead_out(name: str, described: Any, info: Any, metadata: Metadata) -> None:
        elsewhere.write_bytes((engine / info.relative_path).read_bytes())
        if way == "parent":
            info.relative_path = os.path.relpath(elsewhere, engine)
        elif way == "absolute":
            info.relative_path = str(elsewhere)
        else:
            (engine / "link.distcp").symlink_to(elsewhere)
            info.relative_path = "link.distcp"

    with_first_tensor(engine, lead_out)
    text = refusal(run_dir)
    assert ".metadata names the file " in text
    assert "which is not in it" in text


@pytest.mark.parametrize("write", FORMATS)
def test_code_in_the_random_numbers_is_refused(
    write: Callable[[Any], bytes], run_of: RunOf, tmp_path: Path
) -> None:
    path, mark = run_of("ddp") / "checkpoints/checkpoint-2/rng-0.pt", tmp_path / "mark"
    path.write_bytes(write({"torch": Payload(mark)}))
    with pytest.raises(UserError, match=r"rng-0\.pt is refused: .*posix\.mkdir.*remove checkpoint"):
        resuming._restore_rng(path)
    assert not mark.exists()


@pytest.mark.parametrize("state", [{}, {"torch": torch.zeros(3)}, "text"])
def test_other_random_numbers_are_refused(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "rng-0.pt")
    with pytest.raises(UserError, match=r"rng-0\.pt is refused: "):
        resuming._restore_rng(tmp_path / "rng-0.pt")


@pytest.mark.parametrize("damage", ["pickle", "other_step", "list"])
def test_a_state_of_the_trainer_that_is_none_is_refused(
    damage: str, run_of: RunOf, tmp_path: Path
) -> None:
    run_dir, mark = run_of("ddp"), tmp_path / "mark"
    path = run_dir / "checkpoints/checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    path.write_bytes(
        {
            "pickle": pickle.dumps(Payload(mark)),
            "other_step": json.dumps({**state, "global_step": 1}).encode(),
            "list": b"[]",
        }[damage]
    )
    assert "trainer_state.json is " in refusal(run_dir)
    assert not mark.exists()


@pytest.mark.wide
def test_a_whole_run_refuses_code_beside_the_engines_files(run_of: RunOf, tmp_path: Path) -> None:
    run_dir, mark = run_of("ddp"), tmp_path / "mark"
    checkpoint = run_dir / "checkpoints/checkpoint-2"
    sound = (checkpoint / "rng-1.pt").read_bytes()
    (checkpoint / "rng-1.pt").write_bytes(in_zip({"torch": Payload(mark)}))
    seal(checkpoint)
    ended = start(run_dir, grace_seconds=10)
    # Which of the ranks ends first is chance: the other one waits for it.
    assert ended.exit_codes[1] == 2
    assert "rng-1.pt is refused" in ended.console
    assert not mark.exists()

    (checkpoint / "rng-1.pt").write_bytes(sound)
    (checkpoint / "scheduler.pt").write_bytes(in_zip(Payload(mark)))
    seal(checkpoint)
    ended = start(run_dir, grace_seconds=10)
    assert 2 in ended.exit_codes, ended
    assert "scheduler.pt is refused" in ended.console
    assert not mark.exists()


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "step"])
def test_a_whole_run_refuses_code_in_a_tensor_that_a_rank_reads(
    kind: str, run_of: RunOf, tmp_path: Path
) -> None:
    """Where no rank has looked at a tensor before it reads it."""
    run_dir, mark = run_of("fsdp"), tmp_path / "mark"
    checkpoint = run_dir / "checkpoints/checkpoint-2"
    path = checkpoint / "engine/.metadata"
    metadata = pickle.loads(path.read_bytes())
    found = [i for i in metadata.storage_data if i.fqn.endswith(f"h.1.ln_1.weight.{kind}")]
    if kind == "weight":
        found = [i for i in metadata.storage_data if i.fqn == "model.transformer.h.1.ln_1.weight"]
    info = metadata.storage_data[found[-1]]
    data = in_zip(Payload(mark))
    with (checkpoint / "engine" / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(data)
        file.write(data)
    path.write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    # The other one waits for it in a collective, and hears of nothing.
    ended = start(run_dir, grace_seconds=2)
    assert 2 in ended.exit_codes, ended
    assert f"{checkpoint} cannot be resumed: " in ended.console
    assert f"{info.relative_path} at {info.offset} is refused: " in ended.console
    assert "remove it to use an older one" in ended.console
    assert not mark.exists()
