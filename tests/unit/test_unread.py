"""Every field is read in any case, or whoever sets one that nothing reads is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from shardwright.train.config import RunConfig, from_tree
from shardwright.train.config.messages import _SECTIONS
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.rules import unread
from shardwright.train.config.rules.unread import OF_KIND, READ
from shardwright.train.config.sections import Sections
from shardwright.train.errors import UserError
from tests.unit import trees

Settings = Mapping[str, Any]
ZERO = {"strategy": {"kind": "zero", "stage": 2}}
ZERO0 = {"strategy": {"kind": "zero", "stage": 0}}
ZERO3 = {"strategy": {"kind": "zero", "stage": 3}}
FSDP = {"strategy": {"kind": "fsdp"}}
CPU3 = {"strategy": {"kind": "zero", "stage": 3, "offload_optimizer": "cpu"}}
NVME = {
    "strategy": {
        **{"kind": "zero", "stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
        "nvme_path": "/disk",
    }
}
BLIND = {"data.eval_fraction": 0.0}
LINES = {"data.line_by_line": True, "data.document_attention": True}
FP16 = {"precision.compute_dtype": "fp16"}
BF16 = {"precision.compute_dtype": "bf16"}
HUB = {"data": {"kind": "hub", "name": "some/data", "sequence_length": 64}}
HUB_HERE = {"data": {"kind": "hub", "name": "/data/some", "sequence_length": 64}}
READY = {"tokenizer": {"kind": "pretrained", "name": "some/tokenizer"}}
READY_HERE = {"tokenizer": {"kind": "pretrained", "name": "/some/tokenizer"}}
WEIGHTS = {"model": {"kind": "pretrained", "name": "some/model"}, **READY}
WEIGHTS_HERE = {"model": {"kind": "pretrained", "name": "/some/model"}, **READY}
MLM = {
    "model": {**trees.TREE["model"], "kind": "roberta"},
    "objective": {"kind": "mlm"},
}
HOSTS = {"launcher": {"kind": "deepspeed", "nproc_per_node": 4, "hostfile": "/hosts"}}
NO_HOSTS = {"launcher": {"kind": "deepspeed", "nproc_per_node": 4}}
SLURM = {"launcher": {"kind": "slurm", "nproc_per_node": 4}}
TWO_NODES = {"launcher": {"kind": "torchrun", "nproc_per_node": 4, "nodes": 2, "head_address": "a"}}
ONE_RANK = {"launcher": {"kind": "local"}, "strategy": {"kind": "single"}}
GPUS = {"launcher.device": "cuda"}


def text(*paths: str) -> Settings:
    return {"data": {"kind": "text", "sequence_length": 64, "paths": list(paths)}}


def tokens(*paths: str) -> Settings:
    return {**READY, "data": {"kind": "tokens", "sequence_length": 64, "paths": list(paths)}}


def aio(name: str, value: Any) -> tuple[str, Any, Settings, Settings, str]:
    return f"strategy.aio.{name}", value, CPU3, NVME, "nothing is offloaded to nvme"


def optimizer(name: str) -> Settings:
    schedule = {"trainer.lr_scheduler": "constant"} if name == "schedule_free" else {}
    return {"trainer.optimizer": name, **schedule}


def schedule(name: str) -> Settings:
    return {"trainer.lr_scheduler": name}


ADAFACTOR, MUON = optimizer("adafactor"), optimizer("muon")
OWN = {"trainer.optimizer": "custom", "trainer.custom_class": "a.py:f"}
AVERAGED = {"trainer.average_weights": "ema"}
CONSTANT = schedule("constant")
ROLLBACK = {"trainer.on_spike": "rollback", "trainer.save_every_steps": 5}
# Key, a value, with what it is in vain and with what it is read, and what the message says is there
# in place of the condition.
IN_VAIN: tuple[tuple[str, Any, Settings, Settings, str], ...] = (
    ("trainer.adam_beta1", 0.8, optimizer("adafactor"), optimizer("muon"), "optimizer=adafactor"),
    ("trainer.adam_beta2", 0.8, optimizer("adafactor"), {}, "optimizer=adafactor"),
    ("trainer.adam_beta1", 0.8, optimizer("lion"), {}, "optimizer=lion, which has no AdamW"),
    ("trainer.adam_epsilon", 1e-6, optimizer("adafactor"), {}, "optimizer=adafactor"),
    (
        *("trainer.decay_fraction", 0.2, {}, schedule("warmup_stable_decay")),
        "trainer.lr_scheduler=cosine",
    ),
    ("trainer.compile_backend", "eager", {"launcher.device": "cpu"}, GPUS, "launcher.device=cpu"),
    (
        *("trainer.compile_mode", "max-autotune-no-cudagraphs", {**GPUS, **ZERO3}),
        *({"trainer.compile": True}, "strategy.stage=3"),
    ),
    ("trainer.eval_max_samples", 5, BLIND, {}, "data.eval_fraction=0 holds out none"),
    ("trainer.eval_micro_batch_size", 5, BLIND, {}, "data.eval_fraction=0"),
    ("objective.eval_masking_rate", 0.3, {**MLM, **BLIND}, MLM, "data.eval_fraction=0"),
    ("precision.initial_loss_scale", 1024.0, BF16, FP16, "precision.compute_dtype=bf16"),
    ("precision.loss_scale_growth_steps", 7, BF16, FP16, "precision.compute_dtype=bf16"),
    (
        *("data.text_field", "body", text("a.txt", "b.txt.gz")),
        *(text("a.txt", "b.jsonl"), 'data.paths=["a.txt", "b.txt.gz"]'),
    ),
    ("data.dtype", "uint16", tokens("a.npy", "b.parquet"), tokens("a.bin"), "b.parquet"),
    ("data.ids_field", "ids", tokens("a.npy", "b.bin"), tokens("folder"), "b.bin"),
    ("data.max_cut_fraction", 0.5, {}, LINES, "data.line_by_line=false"),
    ("data.revision", "v1", HUB_HERE, HUB, "data.name=/data/some is a directory"),
    ("model.revision", "v1", WEIGHTS_HERE, WEIGHTS, "model.name=/some/model"),
    ("tokenizer.revision", "v1", READY_HERE, READY, "tokenizer.name=/some/tokenizer"),
    ("launcher.backend", "openmpi", NO_HOSTS, HOSTS, "launcher.hostfile=null"),
    ("launcher.backend_arguments", "-v", NO_HOSTS, HOSTS, "launcher.hostfile=null"),
    ("launcher.ssh_port", 2222, NO_HOSTS, HOSTS, "launcher.hostfile=null"),
    ("launcher.log_level_other_ranks", "error", ONE_RANK, {}, "there is one"),
    (
        *("launcher.mail_user", "me", SLURM),
        *({**SLURM, "launcher.mail_type": ["END"]}, "launcher.mail_type=[]"),
    ),
    (
        *("launcher.max_requeues", 5, {**SLURM, "launcher.requeue": False}),
        *(SLURM, "launcher.requeue=false"),
    ),
    ("launcher.head_address", "a", {}, TWO_NODES, "launcher.nodes=1"),
    ("launcher.head_address", "a", NO_HOSTS, HOSTS, "launcher.hostfile=null"),
    ("launcher.head_port", 2000, {}, TWO_NODES, "launcher.nodes=1"),
    ("launcher.rendezvous", "static", {}, TWO_NODES, "launcher.nodes=1"),
    ("strategy.reduce_bucket_elements", 7, ZERO0, ZERO, "strategy.stage=0"),
    ("strategy.overlap_communication", True, ZERO0, ZERO, "strategy.stage=0"),
    ("strategy.reduce_scatter", False, ZERO0, ZERO, "strategy.stage=0"),
    ("strategy.contiguous_gradients", False, ZERO0, ZERO3, "strategy.stage=0"),
    ("strategy.allgather_bucket_elements", 7, ZERO3, ZERO, "strategy.stage=3"),
    ("strategy.prefetch_elements", 7, ZERO, ZERO3, "strategy.stage=2"),
    ("strategy.persistence_elements", 7, ZERO, ZERO3, "strategy.stage=2"),
    ("strategy.max_live_elements", 7, ZERO, ZERO3, "strategy.stage=2"),
    ("strategy.max_reuse_distance_elements", 7, ZERO, ZERO3, "strategy.stage=2"),
    ("strategy.sub_group_elements", 7, ZERO, ZERO3, "strategy.stage=2"),
    ("strategy.max_elements_in_cpu", 7, CPU3, NVME, "strategy.offload_parameters=none"),
    ("strategy.nvme_buffer_count", 7, CPU3, NVME, "strategy.offload_parameters=none"),
    ("strategy.nvme_buffer_elements", 7, CPU3, NVME, "strategy.offload_parameters=none"),
    ("strategy.pin_memory", False, ZERO, CPU3, "strategy=zero offloads nothing"),
    (
        *("strategy.pin_memory", False, FSDP),
        *({"strategy": {"kind": "fsdp", "offload": True}}, "strategy=fsdp offloads nothing"),
    ),
    (
        *("strategy.min_unit_parameters", 7, FSDP),
        *({"strategy": {"kind": "fsdp", "wrap": "size"}}, "strategy.wrap=transformer"),
    ),
    (
        *("strategy.prefetch_units", 2, {"strategy": {"kind": "fsdp", "wrap": "none"}}),
        *(FSDP, "strategy.wrap=none"),
    ),
    aio("block_size_bytes", 4096),
    aio("queue_depth", 2),
    aio("threads", 2),
    aio("single_submit", True),
    aio("overlap_events", False),
    ("trainer.adafactor_beta2_decay", -0.5, {}, ADAFACTOR, "optimizer=adamw"),
    ("trainer.adafactor_clip_threshold", 2.0, {}, ADAFACTOR, "optimizer=adamw"),
    ("trainer.adafactor_epsilon1", 1e-10, {}, ADAFACTOR, "optimizer=adamw"),
    ("trainer.adafactor_epsilon2", 1e-2, {}, ADAFACTOR, "optimizer=adamw"),
    ("trainer.average_decay", 0.5, {}, AVERAGED, "weights=null"),
    ("trainer.average_evaluated", True, {}, AVERAGED, "weights=null"),
    ("trainer.average_every_steps", 2, {}, AVERAGED, "weights=null"),
    ("trainer.average_start_step", 2, {}, AVERAGED, "weights=null"),
    ("trainer.cosine_cycles", 3, {}, schedule("cosine_with_restarts"), "lr_scheduler=cosine"),
    ("trainer.custom_class", "a.py:f", {}, OWN, "optimizer=adamw"),
    ("trainer.custom_moments", 3, {}, OWN, "optimizer=adamw"),
    ("trainer.custom_options", {"a": 1}, {}, OWN, "optimizer=adamw"),
    ("trainer.decay_shape", "sqrt", {}, schedule("warmup_stable_decay"), "lr_scheduler=cosine"),
    ("trainer.lion_beta1", 0.5, {}, optimizer("lion"), "optimizer=adamw"),
    ("trainer.lion_beta2", 0.5, {}, optimizer("lion"), "optimizer=adamw"),
    ("trainer.max_rollbacks", 5, {"trainer.on_spike": "warn"}, ROLLBACK, "on_spike=warn"),
    ("trainer.min_learning_rate_ratio", 0.1, CONSTANT, {}, "lr_scheduler=constant"),
    ("trainer.muon_learning_rate", 0.1, {}, MUON, "optimizer=adamw"),
    ("trainer.muon_learning_rate_scale", "original", {}, MUON, "optimizer=adamw"),
    ("trainer.muon_momentum", 0.5, {}, MUON, "optimizer=adamw"),
    ("trainer.muon_newton_schulz_steps", 3, {}, MUON, "optimizer=adamw"),
    ("trainer.polynomial_power", 3.0, {}, schedule("polynomial"), "lr_scheduler=cosine"),
    ("trainer.sgd_momentum", 0.5, {}, optimizer("sgd"), "optimizer=adamw"),
    ("trainer.sgd_nesterov", True, {}, optimizer("sgd"), "optimizer=adamw"),
    ("trainer.spike_factor", 3.0, {}, {"trainer.on_spike": "warn"}, "on_spike=ignore"),
    ("trainer.spike_window_steps", 30, {}, {"trainer.on_spike": "warn"}, "on_spike=ignore"),
)

# Key, a value, and with what a section or a rule refuses it, where a config is loaded too.
REFUSED: tuple[tuple[str, Any, Settings], ...] = (
    ("checkpoint.push_every", "save", {}),
    ("checkpoint.push_private", False, {}),
    ("checkpoint.push_revision", "step", {}),
    ("checkpoint.push_wait_seconds", 5.0, {}),
    ("checkpoint.best_metric", "eval_perplexity", {}),
    ("checkpoint.keep_best", 1, {}),
    ("checkpoint.keep_every_steps", 5, {}),
    ("data.unpad", True, {}),
    ("launcher.exclude", "a", NO_HOSTS),
    ("launcher.gpu_type", "a100", SLURM),
    ("launcher.include", "a", NO_HOSTS),
    ("model.pad_vocab_to_multiple", 64, {"model": {"kind": "from_config", "name": "a/b"}}),
    ("objective.label_smoothing", 0.1, {"objective.loss": "a.py:f"}),
    ("objective.masking_rate_schedule", "cosine", MLM),
    ("objective.masking_rate_step_at", 0.3, {**MLM, "objective.masking_rate_final": 0.4}),
    ("objective.z_loss", 0.1, {"objective.loss": "a.py:f"}),
    ("strategy.block_class", "Block", {"strategy": {"kind": "fsdp", "wrap": "size"}}),
    ("strategy.cpu_adam", "deepspeed", ZERO),
    ("strategy.gather_16bit_weights_on_save", True, ZERO),
    ("strategy.hierarchical_partition_ranks", 2, ZERO),
    ("strategy.nvme_fast_init", True, CPU3),
    ("strategy.nvme_optimizer_buffer_count", 5, CPU3),
    ("strategy.nvme_path", "/disk", CPU3),
    ("strategy.quantized_gradients", True, ZERO),
    ("strategy.quantized_weights", True, ZERO),
    ("strategy.reshard_ranks", 2, {"strategy": {"kind": "fsdp", "wrap": "none"}}),
    ("strategy.round_robin_gradients", True, ZERO3),
    ("tokenizer.encoding", "r50k_base", READY),
    ("trainer.batch_warmup_from", 4, {}),
    ("trainer.batch_warmup_samples", 4, {}),
    ("trainer.debug.largest_magnitude", 5.0, {}),
    ("trainer.debug.smallest_magnitude", 5.0, {}),
    ("trainer.early_stopping_threshold", 0.1, {}),
    ("trainer.offload_activations", True, {}),
    ("trainer.recompute", "selective", {}),
)

ALWAYS = {
    "": "name run_dir seed sweep_dir",
    "adapter": "alpha dropout export feedforward_modules kind modules_to_save rank rank_stabilized "
    "target_modules",
    "checkpoint": "async export keep_last on_save_error push_to",
    # Of the hub's configurations, the folder that `save_to_disk` wrote has one: found as it is read
    "data": "cache_dir config deduplicate document_attention eval_fraction eval_paths eval_split "
    "filter kind line_by_line max_document_bytes max_documents name names on_bad_document options "
    "packing paths sequence_length source split stages streaming urls version weights",
    # How a cluster is asked stands in a site's own option, for jobs with GPUs and without, alone or
    # of a sweep: array_limit, gpu_request.
    "launcher": "account array array_limit bind bind_cores_to_rank constraint cpus_per_rank "
    "dependency device exclusive extra_sbatch gpu_ids gpu_request gpus_per_node grace_seconds "
    "hostfile kind log_level mail_type max_restarts memory_per_node min_nodes nodes nproc_per_node "
    "partition qos requeue site starts time_limit wait",
    "model": "attention attention_dropout dropout feed_forward fused_gelu "
    "global_attention_every_layers head_dim hidden_size import initializer_factor "
    "initializer_range intermediate_size kind layer_norm_epsilon relative_attention_buckets "
    "relative_attention_max_distance "
    "local_attention_window local_rope_theta max_position_embeddings name num_attention_heads "
    "num_hidden_layers num_key_value_heads overrides quantization rms_norm_epsilon rope_theta step "
    "tie_word_embeddings trust_remote_code type_vocab_size vocab_size",
    "objective": "head_on_labels_only kind least_masking_rate loss mask_token_share masking_rate "
    "masking_rate_final mean_span_length neftune_noise_alpha noise_density prompts "
    "random_token_share whole_word",
    "precision": "allow_tf32 compute_dtype fp8_recipe master_dtype moments_dtype reduce_dtype",
    "strategy": "bucket_size_bytes extra kind node_local_checkpoints offload offload_optimizer "
    "offload_parameters reduce_each_micro_batch replicas reshard_after_forward stage wrap",
    "tokenizer": "alphabet_size character_coverage kind lowercase max_training_bytes min_frequency "
    "name normalizer pre_tokenizer special_tokens split_digits strip_accents trust_remote_code "
    "vocab_size",
    "tracking": "directory entity experiment kind mode project tags uri",
    "trainer": "average_weights callbacks checkpoint_activations_every_blocks "
    "collect_garbage_every_steps compile dataloader_workers debug.noise_scale debug.numerics "
    "debug.statistics_every_steps debug.trace_batches deterministic early_stopping_patience "
    "eval_every_epochs eval_every_steps eval_every_tokens fused_loss global_batch_size "
    "hang_timeout_seconds learning_rate log_every_epochs log_every_steps log_every_tokens "
    "lr_scheduler max_epochs max_grad_norm max_steps max_tokens micro_batch_size on_spike "
    "optimizer profile.at_step profile.ranks profile.steps save_every_epochs save_every_steps "
    "save_every_tokens warmup_fraction warmup_steps weight_decay",
}
"""Fields that are read whatever the others say."""


def config(*settings: Settings) -> RunConfig:
    tree: dict[str, Any] = {**trees.TREE, "trainer": {**trees.TREE["trainer"]}}
    for key, value in (pair for each in settings for pair in each.items()):
        section, *path = key.split(".")
        if not path:
            tree[section] = dict(value) if isinstance(value, dict) else value
            continue
        at = tree[section] = dict(tree.get(section, {}))
        for name in path[:-1]:
            at[name] = dict(at.get(name, {}))
            at = at[name]
        at[path[-1]] = value
    return from_tree(tree)


def fields() -> Iterator[tuple[str, str | None]]:
    """Yield each field of a run by its dotted key, with the kind of its section."""

    def within(section: type[BaseModel], path: str, kind: str | None) -> Iterator[Any]:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from within(inner, f"{path}{name}.", kind)
            else:
                yield f"{path}{field.alias or name}", kind

    for name in Sections.model_fields:
        if name not in _SECTIONS:
            yield name, None
        for section in _SECTIONS.get(name, ()):
            kind = section.model_fields.get("kind")
            yield from within(section, f"{name}.", get_args(kind.annotation)[0] if kind else None)


def test_it_is_known_of_every_field_when_it_is_read() -> None:
    always = {
        f"{group}.{name}".lstrip(".") for group, names in ALWAYS.items() for name in names.split()
    }
    refused = {key for key, *_ in REFUSED}
    unknown = {
        key
        for key, kind in fields()
        if unread.condition_of(key, kind) is None
        and key not in always | refused | {of for of, _ in OF_KIND}
    }
    assert not unknown, (
        "say in train/config/rules/unread.py when they are read, with an example in IN_VAIN here; "
        "name a rule that refuses them in REFUSED; or list them in ALWAYS"
    )
    there = {key for key, _ in fields()}
    assert not (always | refused | READ.keys()) - there
    assert not always & (refused | READ.keys())


def test_each_condition_has_an_example() -> None:
    shown = [key for key, *_ in IN_VAIN]
    assert {*shown} == {*READ, *(key for key, _ in OF_KIND)}
    for key, kind in OF_KIND:
        kinds = [
            dict(s)[key.partition(".")[0]]["kind"] for k, _, s, *_ in IN_VAIN if k == key and s
        ]
        assert kind in [*kinds, trees.TREE[key.partition(".")[0]]["kind"]]


@pytest.mark.parametrize(("key", "value", "vain", "read", "found"), IN_VAIN, ids=lambda v: str(v))
def test_what_nothing_reads_is_told_of_a_new_run(
    key: str, value: Any, vain: Settings, read: Settings, found: str
) -> None:
    in_vain, is_read = config(vain, {key: value}), config(read, {key: value})
    (message,) = unread.problems(in_vain, in_vain)
    assert message.startswith(f"{key}=")
    assert found in message
    assert " only, but " in message
    assert f"or leave {key}=" in message
    assert not list(unread.problems(is_read, is_read))
    assert not list(unread.problems(config(vain), config(vain))), "the default is no setting"
    assert not list(unread.problems(in_vain, in_vain, {key})), "what a run has had is left alone"


@pytest.mark.parametrize(("key", "value", "settings"), REFUSED, ids=lambda v: str(v))
def test_what_a_rule_refuses_is_refused(key: str, value: Any, settings: Settings) -> None:
    config(settings)
    with pytest.raises(UserError) as refused:
        config(settings, {key: value})
    assert key.rpartition(".")[2] in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "vain", "typed", "is_told"),
    [
        ("trainer.adam_beta2", 0.8, {"trainer.optimizer": "lion"}, {"trainer.optimizer"}, False),
        ("trainer.muon_momentum", 0.8, {}, {"trainer.optimizer"}, False),
        ("trainer.min_learning_rate_ratio", 0.1, CONSTANT, {"trainer.lr_scheduler"}, False),
        ("trainer.max_rollbacks", 5, {}, {"trainer.on_spike"}, False),
        ("trainer.eval_max_samples", 5, BLIND, {"data.eval_fraction"}, False),
        ("trainer.eval_max_samples", 5, BLIND, {"data.eval_fraction", "data.paths"}, False),
        ("strategy.prefetch_elements", 5, ZERO, {"strategy.stage"}, False),
        # Both are typed, or in one file, or nothing that is typed has to do with it.
        (
            "trainer.eval_max_samples",
            5,
            BLIND,
            {"data.eval_fraction", "trainer.eval_max_samples"},
            True,
        ),
        ("trainer.eval_max_samples", 5, BLIND, {"trainer.max_steps", "objective"}, True),
        ("strategy.prefetch_elements", 5, ZERO, {"strategy"}, True),
        ("trainer.adam_beta2", 0.8, {"trainer.optimizer": "lion"}, {"trainer"}, True),
    ],
)
def test_what_a_command_line_switches_off_leaves_an_experiments_settings_behind(
    key: str, value: Any, vain: Settings, typed: set[str], is_told: bool
) -> None:
    found = config(vain, {key: value})
    assert bool(list(unread.problems(found, found, typed=typed))) == is_told


def test_the_whole_message() -> None:
    vain = config({"trainer.decay_fraction": 0.2})
    assert list(unread.problems(vain, vain)) == [
        "trainer.decay_fraction=0.2 is read with trainer.lr_scheduler=warmup_stable_decay only, "
        "but trainer.lr_scheduler=cosine; set trainer.lr_scheduler=warmup_stable_decay, or leave "
        "trainer.decay_fraction=0.1"
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_reads_or_refuses_what_adamw_reads(name: str) -> None:
    settings = {**optimizer(name), "trainer.adam_beta2": 0.8}
    if name == "custom":
        settings["trainer.custom_class"] = "a.py:f"
    try:
        found = config(settings)
    except UserError as error:
        problems = [str(error)]
    else:
        problems = list(unread.problems(found, found))
    assert bool(problems) != OPTIMIZERS[name].runs_adamw  # type: ignore[index]
