"""Whole weights come out of a checkpoint, or a clear message does and nothing is written.

The checkpoints are made by torch's own `dcp.save`; those of real engines are in tests/distributed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.read import portable
from shardwright.train.errors import UserError
from shardwright.train.export.contents import contents
from shardwright.train.export.recover import Options, check_extents, recover
from tests.checkpoints import described
from tests.fixtures import TreeOf
from tests.unit.recovering import MAX_MEMORY, once_written
from tests.unit.tensors import in_fragments

Tensors = dict[str, torch.Tensor]

GPT2 = GPT2Config(vocab_size=67, n_embd=16, n_layer=2, n_head=2, n_positions=24)
ROBERTA = RobertaConfig(
    vocab_size=67,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    max_position_embeddings=24,
)
VOCABULARY = {"model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}


def save(directory: Path, tensors: Mapping[str, torch.Tensor], config: Any = GPT2) -> Path:
    """Write a distributed checkpoint of some weights, with the model's config beside it."""
    dcp.save({"model": dict(tensors)}, checkpoint_id=directory, no_dist=True)
    causal = isinstance(config, GPT2Config)
    config.architectures = ["GPT2LMHeadModel" if causal else "RobertaForMaskedLM"]
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def weights() -> Tensors:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2).state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, weights: Tensors) -> Path:
    """Return a checkpoint that no test changes."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoint", weights)


@pytest.fixture
def run_dir(tmp_path: Path, weights: Tensors, tiny_tree: TreeOf) -> Path:
    """Return a run with the checkpoints of steps 1, 2 and 3, of which 2 is the best."""
    run_dir = tmp_path / "run"
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0)):
        checkpoint = run_dir / "checkpoints" / f"checkpoint-{step}"
        shifted = {name: tensor + step for name, tensor in weights.items()}
        save(checkpoint / "engine", shifted)
        (checkpoint / "engine/config.json").rename(checkpoint / "config.json")
        metrics = {"eval_loss": loss}
        manifest = {"step": step, "files": described(checkpoint), "metrics": metrics}
        layout.write_manifest(checkpoint, manifest)
    (run_dir / "config.yaml").write_text(json.dumps(tiny_tree("clm")))
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer/tokenizer.json").write_text(json.dumps(VOCABULARY))
    return run_dir


def recovered(source: Path, out: Path, **options: Any) -> tuple[Tensors, str, str]:
    """Return the weights that are written, and what is printed on stdout and stderr."""
    said, warned = io.StringIO(), io.StringIO()
    recover(Options(source, out, **options), said, warned)
    found = {k: v for file in sorted(out.glob("*.safetensors")) for k, v in load_file(file).items()}
    return found, said.getvalue(), warned.getvalue()


def refused(source: Path, out: Path, **options: Any) -> str:
    """Return the message of a recovery that must leave nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        recover(Options(source, out, **options), io.StringIO(), io.StringIO())
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys() - {"lm_head.weight", "lm_head.decoder.weight"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


# --- what is written ------------------------------------------------------------------------------


def test_a_causal_model_comes_out_as_it_was(saved: Path, weights: Tensors, tmp_path: Path) -> None:
    found, said, warned = recovered(saved, tmp_path / "out")
    assert_equal(found, weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert "GPT2LMHeadModel, 8,048 parameters" in said
    last = said.splitlines()[-1]
    assert re.fullmatch(
        r".*/out: 8,048 parameters, \d\d\.\d kB in \d+\.\d s, peak memory \d+ MiB above the "
        r"imports' \d+ MiB",
        last,
    )
    assert "warning: there is no tokenizer with the checkpoint, so none is written" in warned
    assert (tmp_path / "out/README.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_masked_model_in_small_files_comes_out_as_it_was(tmp_path: Path) -> None:
    model = RobertaForMaskedLM(ROBERTA)
    save(tmp_path / "checkpoint", model.state_dict(), ROBERTA)
    found, said, _ = recovered(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=5000)
    # The head's bias is tied too, and stands under the name that `named_parameters` has first.
    assert_equal(found, {name: p.detach() for name, p in model.named_parameters()})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert f" in {len(files)} files, " in said
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_cast_and_the_config_says_so(
    dtype: str, saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    found, _, _ = recovered(saved, tmp_path / "out", dtype=dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert_equal(found, {name: tensor.to(kind) for name, tensor in weights.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind


def test_sixteen_bits_are_not_called_fp32_unless_asked_for(
    weights: Tensors, tmp_path: Path
) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save(tmp_path / "checkpoint", narrow)
    assert refused(tmp_path / "checkpoint", tmp_path / "out") == (
        "the checkpoint holds no fp32 master weights of transformer.wte.weight, which is in bf16 "
        "there (all parameters are without). Add --dtype=bf16 to write what it holds, or "
        "--allow-upcast to write the same rounded values in fp32"
    )
    found, _, _ = recovered(tmp_path / "checkpoint", tmp_path / "bf16", dtype="bf16")
    assert_equal(found, narrow)
    found, _, _ = recovered(tmp_path / "checkpoint", tmp_path / "fp32", allow_upcast=True)
    assert_equal(found, {name: tensor.float() for name, tensor in narrow.items()})


def test_tied_weights_that_differ_are_both_written(weights: Tensors, tmp_path: Path) -> None:
    differing = {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}
    save(tmp_path / "checkpoint", differing)
    found, _, warned = recovered(tmp_path / "checkpoint", tmp_path / "out")
    assert found.keys() == differing.keys()
    assert "transformer.wte.weight and lm_head.weight are tied in the config and differ" in warned
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded["lm_head.weight"], differing["lm_head.weight"])
    assert torch.equal(loaded["transformer.wte.weight"], weights["transformer.wte.weight"])


@pytest.fixture
def gpt2_on_meta() -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2)


def test_buffers_are_kept_as_they_are(
    gpt2_on_meta: GPT2LMHeadModel, saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    counts = torch.arange(3)
    gpt2_on_meta.register_buffer("counts", counts.to("meta"))
    save(tmp_path / "checkpoint", {**weights, "counts": counts})
    found = contents(gpt2_on_meta, portable.read(tmp_path / "checkpoint"), torch.bfloat16)
    assert torch.equal(found.tensors["counts"].whole(), counts)
    kinds = {output.name: output.dtype for output in found.outputs}
    assert kinds.pop("counts") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
    assert found.parameters == gpt2_on_meta.num_parameters()
    with pytest.raises(UserError, match="the buffer counts is missing"):
        contents(gpt2_on_meta, portable.read(saved), torch.bfloat16)


def test_the_moving_average_is_taken_where_it_is_kept(
    gpt2_on_meta: GPT2LMHeadModel, saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "average", {name: tensor + 1 for name, tensor in weights.items()})
    average = portable.read(tmp_path / "average").weights
    state = dataclasses.replace(portable.read(saved), ema=average)
    for ema, shift in ((True, 1), (False, 0)):
        found = contents(gpt2_on_meta, state, torch.float32, ema=ema).tensors
        assert_equal(
            {n: t.whole() for n, t in found.items()}, {n: t + shift for n, t in weights.items()}
        )


def test_a_dry_run_says_all_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    _, said, _ = recovered(saved, tmp_path / "out", dry_run=True, max_shard_bytes=10_000)
    assert os.listdir(tmp_path) == []
    assert re.search(r"out: fp32, 28 tensors in 4 files, 3\d\.\d kB\n", said)
    assert re.search(r"disk    [\d.]+ [GT]B free\n", said)
    assert "memory  at most 512 MiB above the imports" in said


# --- which checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "taken"), [(None, 3), ("latest", 3), ("best", 2), (1, 1), (2, 2)])
def test_a_runs_checkpoint_is_chosen(
    step: Any, taken: int, run_dir: Path, weights: Tensors, tmp_path: Path
) -> None:
    found, said, warned = recovered(run_dir, tmp_path / "out", step=step)
    assert_equal(found, {name: tensor + taken for name, tensor in weights.items()})
    assert f"run/checkpoints/checkpoint-{taken}\n" in said
    assert warned == ""
    assert f"checkpoint-{taken} of a Shardwright run" in (tmp_path / "out/README.md").read_text()
    tokenizer = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert tokenizer == VOCABULARY


def test_a_damaged_checkpoint_is_passed_over_and_said(
    run_dir: Path, weights: Tensors, tmp_path: Path
) -> None:
    (run_dir / "checkpoints/checkpoint-3/engine/.metadata").write_bytes(b"")
    found, _, warned = recovered(run_dir / "checkpoints", tmp_path / "out")
    assert_equal(found, {name: tensor + 2 for name, tensor in weights.items()})
    assert "checkpoint-3 is not whole: engine/.metadata has 0 bytes instead of" in warned


def test_the_newest_of_another_program_is_the_newest_that_can_be_read(
    weights: Tensors, tmp_path: Path
) -> None:
    for step in (5, 10):
        save(tmp_path / f"outputs/checkpoint-{step}", weights)
    (tmp_path / "outputs/checkpoint-10/.metadata").write_bytes(b"cut short")
    found, said, warned = recovered(tmp_path / "outputs", tmp_path / "out")
    assert_equal(found, weights)
    assert "outputs/checkpoint-5\n" in said
    assert "skipped: " in warned
    assert "checkpoint-10/.metadata cannot be read" in warned


def test_a_step_of_deepspeeds_folders_is_taken_by_its_number(
    weights: Tensors, tmp_path: Path
) -> None:
    for step in (5, 10):
        save(tmp_path / f"saves/global_step{step}", weights)
    _, said, _ = recovered(tmp_path / "saves", tmp_path / "out", step=5)
    assert "saves/global_step5\n" in said


def test_a_step_that_is_not_there_names_those_that_are(run_dir: Path, tmp_path: Path) -> None:
    assert refused(run_dir, tmp_path / "out", step=7) == (
        f"{run_dir}/checkpoints has no checkpoint of step 7; it has 1, 2, 3"
    )


def test_a_step_of_a_checkpoint_itself_is_refused(saved: Path, tmp_path: Path) -> None:
    text = refused(saved, tmp_path / "out", step="latest")
    assert text.startswith(f"--step=latest chooses among the checkpoints of a run, and {saved} is")


def test_the_best_needs_a_rule_and_evaluations(
    run_dir: Path, weights: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "outputs/checkpoint-5", weights)
    text = refused(tmp_path / "outputs", tmp_path / "out", step="best")
    assert text.startswith("--step=best goes by the checkpoint.best_metric of a run's config.yaml")
    for path in (run_dir / "checkpoints").iterdir():
        manifest = json.loads((path / layout.MANIFEST).read_text())
        del manifest["manifest_xxh3_128"]
        layout.write_manifest(path, {**manifest, "metrics": {}})
    text = refused(run_dir, tmp_path / "out", step="best")
    assert text.startswith(f"no checkpoint in {run_dir}/checkpoints was evaluated by eval_loss")


# --- bad input ------------------------------------------------------------------------------------


def test_a_directory_that_is_no_checkpoint_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    text = refused(tmp_path / "photos", tmp_path / "out")
    assert text.startswith(f"{tmp_path}/photos holds no checkpoint")
    assert ".metadata" in text
    assert "*_model_states.pt" in text
    assert refused(tmp_path / "nowhere", tmp_path / "out") == (
        f"{tmp_path}/nowhere does not exist; give a checkpoint, or a run directory"
    )


def test_an_existing_output_is_refused_unless_it_is_empty(
    saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    assert refused(saved, tmp_path / "out") == (
        f"{tmp_path}/out exists already; give a directory that does not, or remove it"
    )
    (tmp_path / "out/thesis.tex").unlink()
    assert_equal(recovered(saved, tmp_path / "out")[0], weights)


def test_an_output_in_the_checkpoint_is_refused(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints/checkpoint-3"
    text = refused(checkpoint, checkpoint / "out")
    assert text.endswith(f"is inside the checkpoint {checkpoint} itself; choose another place")


SHARD = "engine/__0_0.distcp"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), f"{SHARD} is missing"),
        (lambda path: os.truncate(path, 5000), f"{SHARD} has 5000 bytes instead of "),
        (
            lambda path: shutil.copy(path.parents[2] / "checkpoint-2" / SHARD, path),
            f"{SHARD} has the hash ",
        ),
        (lambda path: shutil.copy(path, path.with_name("__1_0.distcp")), "__1_0.distcp is not in"),
        (lambda path: (path.parents[1] / layout.MANIFEST).unlink(), "it has no manifest.json"),
    ],
)
def test_a_checkpoint_that_is_not_as_its_manifest_says_is_refused(
    damage: Callable[[Path], object], problem: str, run_dir: Path, tmp_path: Path
) -> None:
    checkpoint = run_dir / "checkpoints/checkpoint-3"
    damage(checkpoint / SHARD)
    for source, step in ((checkpoint, None), (run_dir, 3)):
        text = refused(source, tmp_path / "out", step=step)
        assert text.startswith(f"{checkpoint} is n")
        assert problem in text


def test_a_file_without_a_manifest_that_is_cut_short_is_refused(
    saved: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    shard = checkpoint / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 300)
    assert f"{shard} at " in refused(checkpoint, tmp_path / "out")
    shard.unlink()
    assert "__0_0.distcp, which is not in it" in refused(checkpoint, tmp_path / "out")


def test_a_file_that_ends_before_its_tensors_is_refused(tmp_path: Path) -> None:
    tensor = in_fragments(torch.ones(9), tmp_path, [4])
    check_extents([tensor])
    os.truncate(tensor.fragments[1].path, 20)
    with pytest.raises(UserError, match=r"part-4 is truncated: it has 20 bytes of at least 27"):
        check_extents([tensor])


def test_a_part_of_a_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints/checkpoint-3"
    manifest = json.loads((checkpoint / layout.MANIFEST).read_text())
    del manifest["manifest_xxh3_128"]
    layout.write_manifest(checkpoint, {**manifest, "part": 0, "parts": 2})
    text = refused(run_dir, tmp_path / "out", step=3)
    assert text.startswith(f"{checkpoint} is part 1 of 2: each node kept what its ranks wrote")


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_crafted_pickle_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    assert "names posix.mkdir, which is refused" in refused(checkpoint, tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def test_no_space_is_found_out_before_the_first_byte(saved: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root, and to be allowed")
    try:
        text = refused(saved, disk / "out")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert re.match(
        r".*/out takes 3\d\.\d kB, and 16\.4 kB are free on its disk; free some space", text
    )


def test_a_model_that_is_not_that_of_the_config_is_refused(
    weights: Tensors, tmp_path: Path
) -> None:
    other = {**weights, "transformer.h.0.gate": torch.ones(2)}
    other["transformer.wpe.weight"] = torch.ones(25, 16)
    del other["transformer.ln_f.bias"]
    save(tmp_path / "checkpoint", other)
    assert refused(tmp_path / "checkpoint", tmp_path / "out") == (
        "the checkpoint holds another model than its config describes: transformer.ln_f.bias is "
        "missing; transformer.wpe.weight has shape (25, 16), not (24, 16); transformer.h.0.gate is "
        "not in the model"
    )


def test_buffers_that_older_versions_saved_are_passed_over(
    weights: Tensors, tmp_path: Path
) -> None:
    older = {**weights, "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool)}
    save(tmp_path / "checkpoint", older)
    assert_equal(recovered(tmp_path / "checkpoint", tmp_path / "out")[0], weights)


def test_values_that_are_not_finite_are_refused(weights: Tensors, tmp_path: Path) -> None:
    poisoned = {name: tensor.clone() for name, tensor in weights.items()}
    poisoned["transformer.h.1.ln_1.weight"][3] = float("nan")
    save(tmp_path / "checkpoint", poisoned)
    assert refused(tmp_path / "checkpoint", tmp_path / "out") == (
        "transformer.h.1.ln_1.weight holds NaN or infinity; --allow-nan writes it anyway. "
        f"{tmp_path}/out is not written"
    )
    found, _, _ = recovered(tmp_path / "checkpoint", tmp_path / "out", allow_nan=True)
    assert found["transformer.h.1.ln_1.weight"].isnan().sum() == 1

    poisoned["transformer.h.1.ln_1.weight"][3] = 1e5
    save(tmp_path / "large", poisoned)
    assert refused(tmp_path / "large", tmp_path / "none", dtype="fp16", allow_nan=True) == (
        "transformer.h.1.ln_1.weight holds 100000, which becomes infinity in float16; choose a "
        f"wider --dtype. {tmp_path}/none is not written"
    )


def test_a_moving_average_that_is_not_there_is_refused(saved: Path, tmp_path: Path) -> None:
    text = refused(saved, tmp_path / "out", ema=True)
    assert text.startswith("--ema: the checkpoint keeps no moving average of the weights")


def test_too_little_memory_is_refused(saved: Path, tmp_path: Path) -> None:
    assert refused(saved, tmp_path / "out", max_memory_bytes=10**6) == (
        "--max-memory=1000000 bytes are too few; give at least 41MiB"
    )


# --- config and tokenizer -------------------------------------------------------------------------


def test_config_and_tokenizer_may_lie_elsewhere(
    saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "deep/checkpoint"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (checkpoint / "config.json").rename(elsewhere / "config.json")
    text = refused(checkpoint, tmp_path / "out")
    assert text.startswith(
        f"{checkpoint} does not say which model it holds: neither {checkpoint}/conf"
    )
    assert text.endswith("with --config")
    text = refused(checkpoint, tmp_path / "out", config=elsewhere, tokenizer=elsewhere)
    assert text.startswith(f"--tokenizer={elsewhere} holds no tokenizer; looked for tokenizer.json")
    assert refused(checkpoint, tmp_path / "out", config=tmp_path) == (
        f"--config={tmp_path}: {tmp_path}/config.json does not exist"
    )

    (elsewhere / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    (elsewhere / "generation_config.json").write_text('{"eos_token_id": 1}')
    found, _, warned = recovered(
        checkpoint, tmp_path / "out", config=elsewhere / "config.json", tokenizer=elsewhere
    )
    assert_equal(found, weights)
    assert warned == ""
    assert {"tokenizer.json", "generation_config.json"} <= set(os.listdir(tmp_path / "out"))

    shutil.copy(elsewhere / "config.json", checkpoint.parent)  # where the Trainer has it
    assert_equal(recovered(checkpoint, tmp_path / "again")[0], weights)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architectures": None}, "names no architecture; add"),
        ({"architectures": ["NoSuchModel"]}, "is that of NoSuchModel, which transformers"),
        ({"architectures": ["GPT2Config"]}, "is that of GPT2Config, which transformers"),
        ({"n_embd": "wide"}, "describes no GPT2LMHeadModel that transformers"),
        ({"n_embd": 17}, "describes no GPT2LMHeadModel that transformers"),
    ],
)
def test_a_config_of_no_model_is_refused(
    change: dict[str, Any], problem: str, saved: Path, tmp_path: Path
) -> None:
    tree = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, **change}))
    text = refused(saved, tmp_path / "out", config=tmp_path)
    assert text.startswith(f"{tmp_path}/config.json {problem}")


# --- interruptions --------------------------------------------------------------------------------


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_recovery_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    with once_written(interrupt), pytest.raises(KeyboardInterrupt):
        recover(Options(saved, tmp_path / "out"), io.StringIO(), io.StringIO())
    assert os.listdir(tmp_path) == []


def test_two_recoveries_of_one_output_are_kept_apart(
    saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    seen: list[str] = []

    def recover_again() -> None:
        if not seen:
            seen.append(refused(saved, tmp_path / "out"))

    with once_written(recover_again):
        recover(Options(saved, tmp_path / "out"), io.StringIO(), io.StringIO())
    assert seen == [f"another recovery is writing {tmp_path}/out now; wait until it has ended"]
    assert_equal(load_file(tmp_path / "out/model.safetensors"), weights)


# --- memory ---------------------------------------------------------------------------------------


CHILD = """
import io, os, signal, sys
from pathlib import Path
from tests.unit.recovering import MAX_MEMORY
from tests.unit.recovering import once_written
from shardwright.train.export.recover import Options
from shardwright.train.process.memory import peak_resident_bytes, resident_bytes
from shardwright.train.export.recover import recover

small, large, out = map(Path, sys.argv[1:])
recover(Options(small, out / "small"), sys.stdout, sys.stderr)  # imports all there is to import
before = resident_bytes()
recover(Options(large, out / "large", max_memory_bytes=MAX_MEMORY), sys.stdout, sys.stderr)
print("above", peak_resident_bytes() - before, flush=True)
with once_written(lambda: os.kill(os.getpid(), signal.SIGKILL)):
    recover(Options(large, out / "killed"), io.StringIO(), io.StringIO())
"""


def test_memory_stays_below_the_bound_and_a_kill_leaves_nothing_that_looks_finished(
    saved: Path, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=30_000, n_embd=1024, n_layer=3, n_head=2, n_positions=24)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    weights = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    assert weights["transformer.wte.weight"].nbytes > 1.5 * MAX_MEMORY
    large = save(tmp_path / "large checkpoint", weights, config)
    assert (large / "__0_0.distcp").stat().st_size > 4 * MAX_MEMORY

    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(saved), str(large), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ended.returncode == -9, ended.stderr
    above = int(ended.stdout.split("above ")[-1])
    assert 0 < above < MAX_MEMORY
    found = load_file(tmp_path / "large/model.safetensors")
    assert_equal(found, weights)

    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.tmp/model.safetensors").is_file()
    recover(Options(large, tmp_path / "killed"), io.StringIO(), io.StringIO())
    assert not (tmp_path / ".killed.tmp").exists()
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert (tmp_path / "killed/model.safetensors").stat().st_size == size
