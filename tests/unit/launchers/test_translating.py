"""Configs and command lines of other programs become overrides that compose, no key left out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.launchers.composition import engine_file
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.translating import accelerate_yaml, deepspeed_json, source
from shardwright.launchers.translating.starting import Started
from shardwright.launchers.translating.trainer_line import translate as translate_flags
from shardwright.launchers.translating.translation import Translation, table
from shardwright.train.config import from_tree, rank_layout, to_yaml
from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.elsewhere.example_scripts import EXAMPLE_SCRIPTS
from shardwright.train.config.elsewhere.trainer_arguments import TRAINER_ARGUMENTS
from shardwright.train.config.rules import unread
from shardwright.train.config.rules.deepspeed_keys import FREE, OWNED, REFUSED
from shardwright.train.errors import UserError
from shardwright.train.strategy.zero.settings import settings as engine_settings
from tests.unit.launchers.composed import composed
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

RANKS = 2
DOCUMENTED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4},
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": 2e8,
        "stage3_max_live_parameters": 1e9,
        "memory_efficient_linear": False,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-4, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 3e-4,
            "warmup_num_steps": 10,
            "total_num_steps": 100,
        },
    },
    "wall_clock_breakdown": False,
}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def outcomes(found: Translation) -> dict[str, str]:
    return {entry.key: f"{entry.outcome}: {entry.text}" for entry in found.entries}


def engine_of(words: list[str]) -> dict[str, Any]:
    """Return the engine's settings of a run that is composed as a user's is."""
    _, run = composed(*words, f"launcher.nproc_per_node={RANKS}", "data.sequence_length=64")
    given = run
    run = resolve(run, Machine(compute_capabilities=(9.0,) * 8, cores=64), "/runs/a")
    assert not list(unread.problems(given, run))
    return engine_settings(run, rank_layout(run.strategy, RANKS))


def test_a_file_of_deepspeed_becomes_a_run() -> None:
    found = deepspeed_json.translate(DOCUMENTED, RANKS)
    _, run = composed(*found.words(), f"launcher.nproc_per_node={RANKS}")
    assert (run.trainer.micro_batch_size, run.trainer.global_batch_size) == (4, 64)
    assert (run.trainer.learning_rate, run.trainer.adam_beta2) == (3e-4, 0.98)
    assert (run.trainer.lr_scheduler, run.trainer.warmup_steps) == ("linear", 10)
    assert (run.trainer.max_steps, run.precision.compute_dtype) == (100, "bf16")
    told = outcomes(found)
    assert set(told) == {path for path, _ in leaves(DOCUMENTED)}
    zero = "zero_optimization"
    assert told[f"{zero}.reduce_bucket_size"].startswith("ignored: auto is filled by the run's own")
    assert told[f"{zero}.stage3_max_live_parameters"] == (
        "ignored: read at stage 3 alone, and this is 2"
    )
    assert told[f"{zero}.memory_efficient_linear"].startswith("extra: strategy.extra.zero_optim")
    assert found.refused == []


def test_a_table_fits_its_terminal() -> None:
    entries = deepspeed_json.translate(DOCUMENTED, RANKS).entries
    assert len(list(table(entries))) == len(entries)
    narrow = list(table(entries, 80))
    assert max(map(len, narrow)) <= 80
    assert narrow[:2] == ["zero_optimization.stage: 2", "    strategy=zero2"]
    assert len(list(table(entries, 400))) == len(entries)


# --- the engine's own values are those of the file ------------------------------------------------

_BOOLEAN = st.booleans()
_SIZE = st.integers(1, 10**9)
_ZERO = {
    "overlap_comm": _BOOLEAN,
    "reduce_scatter": _BOOLEAN,
    "contiguous_gradients": _BOOLEAN,
    "reduce_bucket_size": _SIZE,
    "allgather_bucket_size": _SIZE,
    "round_robin_gradients": _BOOLEAN,
    "sub_group_size": _SIZE,
    "stage3_prefetch_bucket_size": _SIZE,
    "stage3_param_persistence_threshold": _SIZE,
    "stage3_max_live_parameters": _SIZE | st.just(1e9),
    "stage3_max_reuse_distance": _SIZE,
    "stage3_gather_16bit_weights_on_model_save": _BOOLEAN,
    "zero_hpz_partition_size": st.sampled_from([1, 2]),
    "zero_quantized_weights": _BOOLEAN,
    "zero_quantized_gradients": _BOOLEAN,
    "offload_optimizer": st.fixed_dictionaries(
        {"device": st.sampled_from(["none", "cpu"])}, optional={"pin_memory": _BOOLEAN}
    ),
    **{name: _BOOLEAN for name, kind in FREE["zero_optimization"].items() if kind is bool},
}
_FILES = st.fixed_dictionaries(
    {
        "zero_optimization": st.integers(0, 3).flatmap(
            lambda stage: st.fixed_dictionaries({"stage": st.just(stage)}, optional=_ZERO)
        ),
        "train_micro_batch_size_per_gpu": st.integers(1, 16),
    },
    optional={
        "gradient_accumulation_steps": st.integers(1, 8),
        "gradient_clipping": st.floats(0, 10) | st.integers(0, 10),
        "bf16": st.fixed_dictionaries({"enabled": _BOOLEAN}),
        "fp16": st.fixed_dictionaries(
            {"enabled": st.just(False)}, optional={"loss_scale_window": _SIZE}
        ),
        "checkpoint": st.fixed_dictionaries({"use_node_local_storage": _BOOLEAN}),
        "wall_clock_breakdown": _BOOLEAN,
        "prescale_gradients": _BOOLEAN,
        "gradient_predivide_factor": st.floats(1, 8),
        "dump_state": _BOOLEAN,
    },
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(_FILES)
def test_the_engine_gets_what_the_file_says(tree: dict[str, Any]) -> None:
    zero = tree["zero_optimization"]
    # What the engine cannot do at all is refused by rules, which have tests of their own.
    if zero["stage"] == 0:
        zero.pop("offload_optimizer", None)
    found = deepspeed_json.translate(tree, RANKS)
    assert found.refused == []
    engine = dict(leaves(engine_of(found.words())))
    compared = 0
    for entry in found.entries:
        if entry.outcome in ("set", "extra") and entry.key in engine:
            assert engine[entry.key] == entry.value, entry
            compared += 1
    assert compared >= 3
    assert set(outcomes(found)) >= {path for path, _ in leaves(tree)}


@pytest.mark.parametrize("path", sorted({*OWNED, *REFUSED, *DEEPSPEED_JSON}))
def test_each_documented_key_is_accounted_for(path: str) -> None:
    nested: Any = {"enabled": True} if path in DEEPSPEED_JSON else 1
    for part in reversed(path.split(".")):
        nested = {part: nested}
    found = deepspeed_json.translate({"zero_optimization": {"stage": 3}, **nested}, RANKS)
    assert any(path.startswith(key) or key.startswith(path) for key in outcomes(found)), path


@pytest.mark.parametrize(
    ("tree", "key", "told"),
    [
        ({"nonsense": 3}, "nonsense", "refused: DeepSpeed has no such key and would ignore it"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale", "refused: a scale tha"),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            "optimizer.type",
            "refused: there are adamw, lion, sgd, muon, adafactor",
        ),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps",
            "refused: trainer.global_batch_size is 4 x 2 x the number of ranks, which nothing",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", "refused: bf16."),
        (
            {"zero_optimization": {"allgather_partitions": "yes"}},
            "zero_optimization.allgather_partitions",
            "refused: must be true or false",
        ),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning", "ignored: not incl"),
        ({"curriculum_learning": {"enabled": False}}, "curriculum_learning", "ignored: off"),
        ({"zero_optimization": {"cpu_offload": True, "stage": 2}},
         "zero_optimization.cpu_offload", "set: strategy.offload_optimizer=cpu"),
        (
            {"zero_optimization": {"stage": 2, "sub_group_size": 1000}},
            "zero_optimization.sub_group_size",
            "ignored: read at stage 3 alone, and this is 2",
        ),
        (
            {"zero_optimization": {"stage": 0, "reduce_bucket_size": 1000}},
            "zero_optimization.reduce_bucket_size",
            "ignored: read at stages 1, 2 and 3 alone, and this is 0",
        ),
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "eps": 1e-6}}},
            "optimizer.params.eps",
            "ignored: trainer.optimizer=lion has no such setting",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}},
             "optimizer": {"type": "Adam", "params": {"lr": 1e-4}}},
            "optimizer.params.lr",
            "refused: trainer.learning_rate=0.0001 contradicts trainer.learning_rate=0.001",
        ),
    ],
)  # fmt: skip
def test_a_key_of_deepspeeds(tree: dict[str, Any], key: str, told: str) -> None:
    assert outcomes(deepspeed_json.translate(tree))[key].startswith(told)


# --- accelerate -----------------------------------------------------------------------------------

FSDP_FILE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "downcast_bf16": "no",
    "fsdp_config": {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": True,
        "fsdp_sharding_strategy": "SHARD_GRAD_OP",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "GPT2Block",
    },
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 4,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "use_cpu": False,
}


def test_a_file_of_accelerate_for_fsdp_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(FSDP_FILE))
    found = source.of_file(str(tmp_path / "fsdp.yaml"))
    assert found.refused == []
    assert set(outcomes(found)) == {path for path, _ in leaves(FSDP_FILE)}
    _, run = composed(*found.words())
    assert run.strategy.kind == "fsdp"
    assert run.strategy.model_dump(include={"reshard_after_forward", "offload", "block_class"}) == {
        "reshard_after_forward": False,
        "offload": True,
        "block_class": "GPT2Block",
    }
    assert (run.precision.compute_dtype, run.launcher.world_size) == ("bf16", 4)


def test_a_file_of_accelerate_for_deepspeed_takes_its_file_along(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DOCUMENTED))
    tree = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero3_init_flag": False},
        "num_machines": 1,
        "num_processes": 2,
    }
    (tmp_path / "acc.yaml").write_text(yaml.safe_dump(tree))
    found = source.of_file(str(tmp_path / "acc.yaml"))
    assert found.refused == []
    _, run = composed(*found.words())
    assert (run.strategy.kind, run.trainer.global_batch_size) == ("zero", 64)
    short = {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_clipping": 1.0}
    found = accelerate_yaml.translate({**tree, "deepspeed_config": short}, source.read)
    assert found.overrides["strategy"] == "zero3"
    assert found.overrides["strategy.offload_optimizer"] == "cpu"
    assert outcomes(found)["deepspeed_config.zero_stage"] == "set: strategy=zero3"


def test_a_file_of_neither(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text('{"colour": 1}')
    with pytest.raises(UserError, match=r"neither of DeepSpeed nor of accelerate by its keys \(co"):
        source.of_file(str(path))
    path.write_text("[1]")
    with pytest.raises(UserError, match="does not map keys to values"):
        source.of_file(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        source.of_file(str(tmp_path / "absent.json"))


# --- command lines --------------------------------------------------------------------------------

LINES = [
    "torchrun --nproc_per_node 8 run_clm.py --model_type gpt2 --train_file a.txt --do_train "
    '--fsdp "full_shard auto_wrap" --per_device_train_batch_size 8 --output_dir out --bf16',
    "torchrun --nnodes=2 --nproc-per-node=4 --rdzv_endpoint=head:29500 --rdzv_backend=c10d "
    "run_clm.py --config_name DIR --config_overrides n_embd=64,n_layer=2 --tokenizer_name a/b "
    "--dataset_name wikitext --dataset_config_name wikitext-2 --max_steps 50 --block_size 128 "
    "--learning_rate 1e-3 --warmup_ratio 0.1 --gradient_accumulation_steps 2",
    "python run_mlm.py --model_name_or_path roberta-base --train_file a.txt "
    "--validation_file b.txt --mlm_probability 0.2 --line_by_line True --max_seq_length 128 "
    "--num_train_epochs 2 --eval_strategy steps --eval_steps 10 --save_total_limit 3 --use_cpu",
    "CUDA_VISIBLE_DEVICES=0,1 deepspeed --num_gpus 2 run_clm.py --deepspeed DS --model_type gpt2 "
    "--train_file a.txt b.txt --gradient_checkpointing --optim adamw_torch_fused --seed 7",
    "accelerate launch --config_file ACC run_clm.py --model_type gpt2 --train_file a.txt",
    "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 run_clm.py "
    "--model_type gpt2 --train_file a.txt --report_to tensorboard --run_name trial",
    "python -m torch.distributed.run --nproc_per_node=2 run_mlm.py --model_type bert "
    "--train_file=a.txt --lr_scheduler_type cosine --warmup_steps 10 --max_steps 100",
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_composes(line: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DOCUMENTED))
    (tmp_path / "acc.yaml").write_text(yaml.safe_dump(FSDP_FILE))
    for name, path in (("DS", "ds.json"), ("ACC", "acc.yaml"), ("DIR", "model")):
        line = line.replace(f" {name} ", f" {tmp_path / path} ")
    words = shlex.split(line)
    found = source.of_line(words)
    assert found.refused == []
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    given = {flag[2:].replace("-", "_") for flag in flags}
    told = " ".join(outcomes(found))
    for flag in given & {*TRAINER_ARGUMENTS, *EXAMPLE_SCRIPTS}:
        assert flag in told, flag
    _, run = composed(*found.words())
    assert run.objective.kind == ("mlm" if "mlm" in line else "clm")
    assert run.trainer.global_batch_size % run.launcher.world_size == 0


def test_what_the_trainer_does_by_itself_is_said() -> None:
    found = source.of_line(shlex.split("python run_clm.py --model_type gpt2 --train_file a.txt"))
    _, run = composed(*found.words())
    trainer = run.trainer
    assert (trainer.learning_rate, trainer.lr_scheduler, trainer.max_epochs) == (5e-5, "linear", 3)
    assert (trainer.weight_decay, trainer.adam_beta2, run.seed) == (0.0, 0.999, 42)
    assert trainer.global_batch_size == trainer.micro_batch_size == 8
    assert outcomes(found)["seed"] == "set: seed=42 (the Trainer's default)"


def test_an_optimizer_without_adamw_gets_none_of_its_settings() -> None:
    line = "python run_clm.py --model_type gpt2 --train_file a.txt --adam_epsilon 1e-6 --optim "
    found = source.of_line(shlex.split(f"{line} adafactor"))
    _, run = composed(*found.words())
    assert (run.trainer.optimizer, run.trainer.adam_beta2) == ("adafactor", 0.95)
    assert outcomes(found)["adam_epsilon"].startswith("ignored: trainer.optimizer=adafactor has no")
    assert not list(unread.problems(run, run))
    _, run = composed(*source.of_line(shlex.split(f"{line} lion_32bit")).words())
    assert (run.trainer.optimizer, run.trainer.lion_beta2) == ("lion", 0.999)


def test_what_comes_with_each_epoch_does_so_here() -> None:
    line = "python run_clm.py --model_type gpt2 --train_file a.txt --eval_strategy epoch "
    line += "--save_strategy epoch --logging_strategy epoch --save_steps 7 --save_total_limit 2"
    found = source.of_line(shlex.split(line))
    assert not found.refused
    _, run = composed(*found.words())
    for kind in ("log", "eval", "save"):
        assert run.trainer.cadence(kind) == {f"{kind}_every_epochs": 1}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--push_to_hub", ("out", "save", True)),
        ("--push_to_hub --hub_model_id me/x --hub_strategy end", ("me/x", "final", True)),
        ("--push_to_hub --hub_strategy checkpoint", ("out", "checkpoints", True)),
        ("--push_to_hub --hub_private_repo false", ("out", "save", False)),
        ("--hub_model_id me/x --hub_strategy end", (None, "final", True)),
    ],
)
def test_a_script_that_pushes_does_so_here(flags: str, expected: tuple[Any, ...]) -> None:
    line = f"python run_clm.py --model_type gpt2 --train_file a.txt --output_dir a/out {flags}"
    found = source.of_line(shlex.split(line))
    assert not found.refused
    _, run = composed(*found.words())
    kept = run.checkpoint
    assert (kept.push_to, kept.push_every, kept.push_private) == expected


SAMPLES: dict[str, Any] = {
    "eval_strategy": "steps", "save_strategy": "steps", "logging_strategy": "steps",
    "lr_scheduler_type": "cosine", "optim": "adamw_torch", "report_to": "none",
    "metric_for_best_model": "eval_loss", "deepspeed": '{"zero_optimization": {"stage": 1}}',
    "fsdp": "full_shard", "fsdp_config": '{"reshard_after_forward": true}', "max_steps": 5,
    "dtype": "bfloat16", "torch_dtype": "float32", "model_type": "gpt2", "eval_steps": 5,
    "output_dir": "out", "run_name": "trial", "project": "mine", "learning_rate": 1e-3,
}  # fmt: skip
UNTRANSLATED = {
    *("lr_scheduler_kwargs", "optim_args", "config_overrides"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
}
"""Mappings within a flag, which are refused with the keys to set."""


@pytest.mark.parametrize(
    "name",
    [n for p in (TRAINER_ARGUMENTS, EXAMPLE_SCRIPTS) for n, r in p.items() if r.becomes == "field"],
)
def test_each_flag_that_has_a_field_is_translated(name: str) -> None:
    value = SAMPLES.get(name, 1)
    found = translate_flags("run_clm.py", {name: value}, Started(), source.read)
    refused = {entry.key for entry in found.refused}
    assert refused == ({name} if name in UNTRANSLATED else set())
    if name in UNTRANSLATED:
        assert "has no translation; use " in found.refused[0].text or "a preset" in str(
            found.refused
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("torchrun --nproc_per_node 2", "names no script"),
        ("mpirun run_clm.py --bf16", "mpirun is no program that starts training scripts"),
        ("python run_clm.py stray --bf16", "stray belongs to no flag"),
        ("python run_clm.py --deepspeed {broken", "--deepspeed is not JSON"),
    ],
)
def test_a_line_that_cannot_be_read(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source.of_line(line.split())


# --- in a run's own command line ------------------------------------------------------------------


@pytest.fixture
def ds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine_file, "_shown", set())
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(DOCUMENTED))
    return path


def test_a_run_takes_the_values_of_a_file_and_forgets_it(
    ds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["strategy=deepspeed_file", f"strategy.path='{ds}'", "launcher.nproc_per_node=2"]
    _, run = composed(*words, "trainer.max_grad_norm=0.50")
    assert (run.strategy.kind, run.trainer.max_grad_norm) == ("zero", 0.5)
    assert "trainer.max_grad_norm=0.5" in capsys.readouterr().err
    ds.unlink()
    assert from_tree(yaml.safe_load(to_yaml(run))) == run
    assert str(ds) not in to_yaml(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["launcher.nproc_per_node=2", "trainer.max_grad_norm=2.0"],
            r"trainer\.max_grad_norm=2\.0 contradicts trainer\.max_grad_norm=0\.5, which is of "
            r"strategy\.path=.*ds\.json; leave one of them out",
        ),
        (
            ["launcher.nproc_per_node=2", "precision=fp32"],
            r"precision=fp32 contradicts precision=bf16, which is of strategy\.path=",
        ),
        (
            ["launcher.nproc_per_node=2", "strategy.stage=3"],
            r"strategy\.stage=3 contradicts strategy=zero2, which is of strategy\.path=",
        ),
        ([], r"gradient_accumulation_steps=8: trainer\.global_batch_size is 4 x 8 x the number of"),
    ],
)
def test_what_contradicts_a_file(ds: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed("strategy=deepspeed_file", f"strategy.path={ds}", *words)


def test_a_file_that_is_of_another_program_or_not_given(ds: Path) -> None:
    with pytest.raises(UserError, match="strategy=deepspeed_file needs the file: strategy.path=FI"):
        composed("strategy=deepspeed_file")
    with pytest.raises(
        UserError, match="is a config of deepspeed, not of accelerate; choose strat"
    ):
        composed("strategy=accelerate_file", f"strategy.path={ds}")
    _, run = composed("strategy=deepspeed_file", f"strategy.path={ds}",
                      "trainer.global_batch_size=32")  # fmt: skip
    assert run.trainer.global_batch_size == 32


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_one_run_takes_no_file_among_other_strategies(multirun: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        composed(*multirun, "strategy=ddp,deepspeed_file", "strategy.path=ds.json")
    assert str(refused.value) == (
        "strategy=ddp,deepspeed_file: one run has one strategy; to vary the file of an engine, say "
        "shardwright sweep strategy=ddp,deepspeed_file strategy.path=FILE"
    )


def test_a_sweep_varies_strategies_that_are_files_among_others(
    ds: Path, shardwright: Shardwright, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**DOCUMENTED, "gradient_clipping": 0.7}))
    common = ["--dry-run", "model=gpt2_tiny", "launcher.device=cpu", "launcher.nproc_per_node=2"]
    mixed = ["strategy=ddp,deepspeed_file,fsdp", f"strategy.path={ds}"]
    outcome = shardwright("sweep", *common, *mixed)
    assert outcome.code == 0, outcome.err
    rows = re.findall(r"^\d +not started +(\S+)$", outcome.out, re.MULTILINE)
    assert rows == ["ddp", "deepspeed_file", "fsdp"]
    # The first point is none of a file: its command has none either.
    command = outcome.out.strip().splitlines()[-1]
    assert "strategy=ddp" in command
    assert "strategy.path" not in command

    files = ["strategy=deepspeed_file", f"strategy.path={ds},{other}"]
    outcome = shardwright("sweep", *common, *files)
    assert outcome.code == 0, outcome.err
    assert len(re.findall(r"^\d +not started", outcome.out, re.MULTILINE)) == 2

    outcome = shardwright("sweep", *common, "strategy=ddp,fsdp", f"strategy.path={ds}")
    assert outcome.code == 2
    assert "unknown key strategy.path" in outcome.err


def test_the_command_prints_overrides_and_accounts_for_keys(
    ds: Path, shardwright: Shardwright
) -> None:
    outcome = shardwright("translate", str(ds), "--ranks", "2")
    assert outcome.code == 0
    assert outcome.out.startswith("shardwright train strategy=zero2 precision=bf16 ")
    assert "gradient_clipping" in outcome.err
    found = json.loads(shardwright("translate", "--json", str(ds)).out)
    assert found["command"].startswith("shardwright train ")
    assert {each["becomes"] for each in found["keys"]} == {"set", "extra", "ignored", "refused"}
    outcome = shardwright("translate")
    assert outcome.code == 2
    assert "give one thing to translate: a file" in outcome.err
    outcome = shardwright("translate", "--", "torchrun", "run_clm.py", "--bf16")
    assert (outcome.code, "precision=bf16" in outcome.out) == (0, True)
