"""Every name that the Trainer, its scripts, accelerate and DeepSpeed know has an answer here."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from shardwright.launchers.__main__ import COMMANDS
from shardwright.train.config import elsewhere
from shardwright.train.config.elsewhere import accelerate_launch
from shardwright.train.config.elsewhere.bitsandbytes_config import BITSANDBYTES
from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.elsewhere.example_scripts import EXAMPLE_SCRIPTS
from shardwright.train.config.elsewhere.fsdp_plugin import FSDP_PLUGIN
from shardwright.train.config.elsewhere.row import rows
from shardwright.train.config.elsewhere.trainer_arguments import TRAINER_ARGUMENTS
from shardwright.train.config.elsewhere.trainer_parameters import TRAINER_PARAMETERS
from shardwright.train.config.messages import OPTIONS, known_keys, unknown_key_message
from shardwright.train.config.rules import deepspeed_keys

PROGRAMS = {
    "trainer": TRAINER_ARGUMENTS,
    "constructor": TRAINER_PARAMETERS,
    "scripts": EXAMPLE_SCRIPTS,
    "accelerate": accelerate_launch.ACCELERATE_LAUNCH,
    "fsdp": FSDP_PLUGIN,
    "deepspeed": DEEPSPEED_JSON,
    "bitsandbytes": BITSANDBYTES,
}
GONE_FROM_TRAINER = {
    "include_tokens_per_second",
    "logging_dir",
    "overwrite_output_dir",
    "warmup_ratio",
}
"""Arguments of transformers 4 that people still write, and 5.23 has no longer."""
# Those of transformers' scripts (v5.2, and 4.20 for the names that went), which no package has.
OF_SCRIPTS = (
    "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir "
    "use_fast_tokenizer model_revision token use_auth_token trust_remote_code dtype torch_dtype "
    "low_cpu_mem_usage dataset_name dataset_config_name train_file validation_file "
    "max_train_samples max_eval_samples streaming block_size max_seq_length mlm_probability "
    "line_by_line pad_to_max_length overwrite_cache validation_split_percentage "
    "preprocessing_num_workers keep_linebreaks"
)


def test_each_argument_of_the_trainer() -> None:
    from transformers import TrainingArguments

    there_are = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert there_are - set(TRAINER_ARGUMENTS) == set()
    assert set(TRAINER_ARGUMENTS) - there_are == GONE_FROM_TRAINER


def test_each_parameter_of_the_trainer() -> None:
    from transformers import Trainer

    there_are = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert set(TRAINER_PARAMETERS) == there_are


def test_each_argument_of_the_scripts() -> None:
    assert set(EXAMPLE_SCRIPTS) == set(OF_SCRIPTS.split())


def test_each_flag_of_accelerate() -> None:
    from accelerate.commands.launch import launch_command_parser

    there_are = {action.dest for action in launch_command_parser()._actions}
    assert [name for name in sorted(there_are) if accelerate_launch.row(name) is None] == []
    assert set(accelerate_launch.ACCELERATE_LAUNCH) - there_are == set()


def test_each_field_of_accelerates_fsdp() -> None:
    from accelerate import FullyShardedDataParallelPlugin

    there_are = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    assert there_are - set(FSDP_PLUGIN) == set()
    # As `fsdp_config` calls it.
    assert set(FSDP_PLUGIN) - there_are == {"transformer_layer_cls_to_wrap"}


def test_each_setting_of_bitsandbytes() -> None:
    from transformers import BitsAndBytesConfig

    there_are = set(inspect.signature(BitsAndBytesConfig.__init__).parameters)
    # What `from_pretrained` calls the whole of it.
    assert set(BITSANDBYTES) == there_are - {"self", "kwargs"} | {"quantization_config"}


def test_each_key_of_deepspeeds_zero() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    taken = {path.rpartition(".")[2] for path in deepspeed_keys.OWNED}
    taken |= {path.partition(".")[2] for path in deepspeed_keys.REFUSED}
    taken |= set(deepspeed_keys.FREE["zero_optimization"])
    own = {path.partition(".")[2] for path in DEEPSPEED_JSON}
    there_are = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert there_are - taken - own == set()
    # What the passthrough takes, or refuses with a reason of its own, has no second answer.
    assert set(DEEPSPEED_JSON) & (set(deepspeed_keys.OWNED) | set(deepspeed_keys.REFUSED)) == set()
    assert set(DEEPSPEED_JSON) & set(deepspeed_keys.FREE) == {"zero_optimization"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_an_answer_names_is_there(program: str) -> None:
    known, options = set(known_keys()), {o for k in OPTIONS["strategy"].values() for o in k}
    for name, row in PROGRAMS[program].items():
        for key in re.findall(r"\b(?:[a-z]+\.)[a-z_]+\b", row.text):
            assert key in known or key == "metrics.jsonl", f"{name}: {row.text}"
        for command in re.findall(r"`shardwright (\w+)", row.text):
            assert command in COMMANDS, f"{name}: {row.text}"
        for word in re.findall(r"\bstrategy=(\w+)", row.text):
            assert word in options, f"{name}: {row.text}"
        if row.becomes == "field":
            named = set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)?\b", row.text))
            assert named & known or re.search(r"\b[A-Z]+_[A-Z_]+\b", row.text), f"{name}"
        if row.becomes == "command":
            assert "`shardwright " in row.text, f"{name}: {row.text}"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("hub_model_id", "use checkpoint.push_to, or `shardwright push RUN_DIR NAME` when the run"),
        ("launcher.num_gpus", "use launcher.nproc_per_node"),
        ("trainer.ddp_find_unused_parameters", "leave it out: every parameter of these models has"),
        ("trainer.neftune_noise_alpha", "did you mean objective.neftune_noise_alpha?"),
        ("trainer.liger_kernel_config", "leave it out, it is not included: the fused loss here is"),
        ("model.load_in_4bit", "use model.quantization=4bit"),
        ("megatron_lm_tp_degree", "leave it out, it is not included: ranks divide data and states"),
        ("strategy.fsdp_sharding_strategy", "use strategy=fsdp, fsdp_grad_op, fsdp_hybrid or ddp"),
        ("autotuning", "use `shardwright plan hardware=...`, which compares the strategies"),
        # What another section has by this very name comes before what a program calls so.
        ("model.learning_rate", "did you mean trainer.learning_rate?"),
    ],
)
def test_a_name_from_elsewhere_leads_to_its_answer(key: str, message: str) -> None:
    assert unknown_key_message(key).startswith(f"unknown key {key}: {message}")


def test_no_name_has_two_answers() -> None:
    with pytest.raises(AssertionError, match="seed has two answers"):
        rows(fields={"seed": "seed"}, commands={}, derived={"seed": "it is 0"}, left_out={})


def test_what_is_unknown_everywhere_has_no_answer() -> None:
    assert elsewhere.row("qqqq") is None
