"""What to say to a user whose config has a wrong key or value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from shardwright.train.config import elsewhere
from shardwright.train.config.model import ModelConfig
from shardwright.train.config.section import shown
from shardwright.train.config.sections import Sections

# What people call things, besides the names of the programs in `elsewhere`, and what to write here.
ALIASES = {
    "accelerator": "launcher.device",
    "accumulate_grad_batches": "trainer.global_batch_size: the accumulation steps follow from it",
    "adafactor": "trainer.optimizer=adafactor",
    "adam_eps": "trainer.adam_epsilon",
    "async_save": "checkpoint.async",
    "asynchronous": "checkpoint.async",
    "attn_implementation": "model.attention",
    "batch_size": "trainer.global_batch_size (all ranks) or trainer.micro_batch_size (one pass)",
    "batch_size_warmup": "trainer.batch_warmup_from and trainer.batch_warmup_samples",
    "beta1": "trainer.adam_beta1",
    "beta2": "trainer.adam_beta2",
    "cache": "data.cache_dir",
    "checkpointing_steps": "trainer.save_every_steps",
    "clip_grad": "trainer.max_grad_norm",
    "clip_grad_norm": "trainer.max_grad_norm",
    "context_length": "data.sequence_length",
    "corpus": "data=text data.paths=[...]",
    "cpu_checkpointing": "trainer.offload_activations",
    "cpus_per_task": "launcher.cpus_per_rank",
    "d_model": "model.hidden_size",
    "dataset": "data=hub data.name=... or, for files of your own, data=text data.paths=[...]",
    "dataset_config": "data=hub data.config=...",
    "devices": "launcher.nproc_per_node",
    "dropout_rate": "model.dropout",
    "early_stopping": "trainer.early_stopping_patience",
    "epoch": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "eps": "trainer.adam_epsilon",
    "evaluation_strategy": "trainer.eval_every_steps",
    "ffn_dim": "model.intermediate_size",
    "float8": "precision=fp8",
    "fp8": "precision=fp8",
    "gbs": "trainer.global_batch_size",
    "global_batch": "trainer.global_batch_size",
    "gpus": "launcher.nproc_per_node",
    "grace_period": "launcher.grace_seconds",
    "grad_accum": "trainer.global_batch_size: the accumulation steps follow from it",
    "grad_clip": "trainer.max_grad_norm",
    "gradient_clip_val": "trainer.max_grad_norm",
    "gres": "launcher.gpus_per_node",
    "hardware": "launcher.device and launcher.nproc_per_node: `shardwright plan` knows the word",
    "keep_checkpoints": "checkpoint.keep_last",
    "layers": "model.num_hidden_layers",
    "learning_rate_scheduler": "trainer.lr_scheduler",
    "log_every_n_steps": "trainer.log_every_steps",
    "lr": "trainer.learning_rate",
    "lr_warmup_steps": "trainer.warmup_steps",
    "mask_prob": "objective.masking_rate",
    "mask_probability": "objective.masking_rate, and objective.masking_rate_final at the end",
    "mask_ratio": "objective.masking_rate",
    "max_iters": "trainer.max_steps",
    "max_length": "data.sequence_length",
    "max_sequence_length": "data.sequence_length",
    "max_train_steps": "trainer.max_steps",
    "mbs": "trainer.micro_batch_size",
    "mean_noise_span_length": "objective.mean_span_length, under objective=span_corruption",
    "mem": "launcher.memory_per_node",
    "micro_batch": "trainer.micro_batch_size",
    "mlflow_tracking_uri": "tracking=mlflow tracking.uri=...",
    "model_id": "model=pretrained model.name=...",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_layer": "model.num_hidden_layers",
    "n_positions": "model.max_position_embeddings",
    "ngpus": "launcher.nproc_per_node",
    "nnodes": "launcher.nodes",
    "no_cuda": "launcher.device=cpu",
    "nproc": "launcher.nproc_per_node",
    "ns_steps": "trainer.muon_newton_schulz_steps",
    "ntasks_per_node": "launcher.nproc_per_node",
    "num_epochs": "trainer.max_epochs",
    "num_gpus": "launcher.nproc_per_node",
    "num_heads": "model.num_attention_heads",
    "num_layers": "model.num_hidden_layers",
    "num_nodes": "launcher.nodes",
    "num_warmup_steps": "trainer.warmup_steps",
    "num_workers": "trainer.dataloader_workers",
    "output": "run_dir",
    "patience": "trainer.early_stopping_patience",
    "per_gpu_train_batch_size": "trainer.micro_batch_size",
    "r": "adapter.rank, under adapter=lora or dora",
    "rampup_batch_size": "trainer.batch_warmup_from and trainer.batch_warmup_samples",
    "resume": "run_dir of a new run here; `shardwright resume RUN_DIR` continues one that is there",
    "save_path": "run_dir",
    "save_top_k": "checkpoint.keep_best",
    "sampling_eps": "objective.least_masking_rate, under objective=diffusion",
    "scheduler": "trainer.lr_scheduler",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "shutdown_timeout": "launcher.grace_seconds",
    "sweep": "`shardwright sweep sweep=NAME`: train starts what has one value for each key",
    "tensorboard": "tracking=tensorboard",
    "termination_grace_period_seconds": "launcher.grace_seconds",
    "time": "launcher.time_limit",
    "tracking_uri": "tracking=mlflow tracking.uri=...",
    "trackio": "tracking=trackio",
    "train_batch_size": "trainer.global_batch_size",
    "train_data": "data=text data.paths=[...]",
    "train_files": "data=text data.paths=[...]",
    "train_micro_batch_size": "trainer.micro_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "train_steps": "trainer.max_steps",
    "val_check_interval": "trainer.eval_every_steps",
    "wandb": "tracking=wandb",
    "wandb_project": "tracking=wandb tracking.project=...",
    "warmup": "trainer.warmup_steps or trainer.warmup_fraction",
    "wd": "trainer.weight_decay",
    "world_size": "launcher.nproc_per_node and launcher.nodes",
}

# The options of conf/ by the kind that they have: what to choose where a key belongs to another.
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        get_args(section.model_fields["kind"].annotation)[0]: section.options
        for section in get_args(get_args(ModelConfig)[0])
    },
    "strategy": {
        "auto": ("auto",),
        "single": ("single",),
        "ddp": ("ddp",),
        "zero": (
            *("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"),
        ),
        "fsdp": ("fsdp", "fsdp_grad_op", "fsdp_hybrid", "fsdp_hybrid_grad_op", "fsdp_offload"),
    },
}


def options_of(group: str, kind: str) -> tuple[str, ...]:
    """Return the options of a group that have a kind; where nothing else is known, its name."""
    return OPTIONS.get(group, {}).get(kind, (kind,))


def owners(key: str) -> list[str]:
    """Return the options of a group whose files have a dotted key; none where all of them have."""
    group, _, leaf = key.partition(".")
    sections = _SECTIONS.get(group, [])
    if len(sections) < 2:
        return []
    have = [kind for kind, s in zip(_TAGGED[group], sections, strict=True) if _has(s, leaf)]
    return [] if len(have) == len(sections) else [o for k in have for o in options_of(group, k)]


def _has(section: type[BaseModel], path: str) -> bool:
    name = path.partition(".")[0]
    return any(name == (field.alias or attr) for attr, field in section.model_fields.items())


def known_keys() -> list[str]:
    """Return every dotted key that some config can have, sections included."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for attribute, field in section.model_fields.items():
            name = field.alias or attribute  # a key may be a Python keyword
            yield prefix + name
            for inner in _sections_of(field.annotation):
                yield from walk(inner, f"{prefix}{name}.")

    return list(dict.fromkeys(walk(Sections, "")))


def nearest_key(key: str) -> str | None:
    """Return the known dotted key that looks most like ``key``, or None where none does.

    A sibling comes before a key of the same or nearly the same name in another section.
    """
    known = known_keys()
    section, _, leaf = key.rpartition(".")
    by_leaf: dict[str, str] = {}
    for candidate in known:
        by_leaf.setdefault(candidate.rpartition(".")[2], candidate)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for names, cutoff in ((siblings, 0.7), (by_leaf, 0.8), (siblings, 0.5)):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
            return names[close[0]]
    if siblings:  # the name of the section alone would make all of them alike
        return None
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return close[0] if close else None


LIST = "a list, such as [a, b]"
MAPPING = "a mapping, such as {key: value}"
"""What a value of several has to be, in words that follow "must be"."""


def takes_a_list(key: str) -> bool:
    """Return whether a dotted key is that of a list, of a section of some kind."""
    group, _, path = key.partition(".")
    sections = _SECTIONS.get(group, [])
    annotations: list[Any] = []
    for name in path.split("."):
        fields = [
            (field.alias or n, field) for s in sections for n, field in s.model_fields.items()
        ]
        annotations = [field.annotation for found, field in fields if found == name]
        sections = [section for found in annotations for section in _sections_of(found)]
    return any(map(_is_list, annotations))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_is_list, get_args(annotation)))


def meant(name: str) -> str | None:
    """Return what to write for a name that people or other programs use; None where none does."""
    if name in ALIASES:
        return ALIASES[name]
    row = elsewhere.row(name)
    return row.text if row is not None and row.becomes == "field" else None


def unknown_key_message(key: str) -> str:
    """Say what to write in place of an unknown dotted key."""
    leaf = key.rpartition(".")[2]
    if (line := _unknown_in_an_entry(key)) is not None:
        return line
    if leaf in ALIASES:
        return f"unknown key {key}: use {ALIASES[leaf]}"
    known = known_keys()
    is_leaf = leaf in {each.rpartition(".")[2] for each in known}
    if (row := elsewhere.row(leaf)) is not None and not is_leaf:
        return f"unknown key {key}: {row.advice}"
    if key in known:
        group = key.partition(".")[0]
        return f"{key} is not part of this config; choose an option of {group} with {group}=NAME"
    groups = [g for g, kinds in OPTIONS.items() for names in kinds.values() if leaf in names]
    if groups:
        return f"unknown key {key}: {leaf} is an option of {groups[0]}; write {groups[0]}={leaf}"
    near = nearest_key(key)
    hint = f"did you mean {near}?" if near else "`shardwright train --cfg job` lists the known ones"
    return f"unknown key {key}: {hint}"


def _unknown_in_an_entry(key: str) -> str | None:
    """Say what an entry of a list of sections has, where an unknown key is in one, as in a.0.b."""
    outer, _, inner = re.sub(r"\.(\d+)\.", r"[\1].", key, count=1).rpartition("].")
    name, _, number = outer.partition("[")
    section, _, field = name.partition(".")
    entries = [
        entry
        for kind in _SECTIONS.get(section, [])
        if field in kind.model_fields
        for entry in _sections_of(kind.model_fields[field].annotation, of_lists=True)
    ]
    if not entries:
        return None
    names = list(entries[0].model_fields)
    close = difflib.get_close_matches(inner, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"unknown key {name}[{number}].{inner}: {hint}an entry of {name} has "
        f"{', '.join(names[:-1])} and {names[-1]}"
    )


def problems(errors: list[ErrorDetails], typed: Collection[str] | None = None) -> list[str]:
    """Return one line for each problem; the branches of a union make one line together.

    ``typed`` are the keys that a command line itself has; None where nothing is known of it.
    """
    lines: list[str] = []
    wanted: dict[str, list[str]] = {}
    paths = [tuple(error["loc"]) for error in errors]
    for error, path in zip(errors, paths, strict=True):
        # A list whose items are wrong is counted without them.
        if error["type"] == "too_short" and any(p[:-1] == path for p in paths):
            continue
        key = _dotted_key(error)
        if (line := _structural_problem(key, error, typed)) is not None:
            lines.append(line)
            continue
        if key not in wanted:
            lines.append(f"{key}={shown(error['input'])}: must be ")
        wanted.setdefault(key, []).append(_expectation(error))
    return [
        line + " or ".join(dict.fromkeys(wanted[line.partition("=")[0]]))
        if line.endswith(": must be ")
        else line
        for line in dict.fromkeys(lines)
    ]


def expectation(errors: Sequence[ErrorDetails]) -> str:
    """Return what a value has to be, in words that follow "must be"."""
    return " or ".join(dict.fromkeys(_expectation(error) for error in errors))


def _dotted_key(error: ErrorDetails) -> str:
    parts = list(error["loc"])
    # Behind a tagged union stands the tag, behind a plain one its branch ("constrained-int").
    if len(parts) > 1 and parts[0] in _TAGGED:
        del parts[1]
    if error["type"] != "extra_forbidden":
        parts = [p for p in parts if isinstance(p, int) or (p.isidentifier() and p != "bool")]
    return ".".join(str(part) for part in parts)


def _structural_problem(key: str, error: ErrorDetails, typed: Collection[str] | None) -> str | None:
    """Explain an error of the tree's shape or of a rule; None where a value is to blame."""
    group = str(error["loc"][0]) if error["loc"] else ""
    match error["type"]:
        case "extra_forbidden":
            if key in known_keys() and (names := owners(key)):
                others = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
                remedy = f"add {group}={others}" if len(names) == 1 else "choose one of them"
                without = f"leave {key} out"
                if typed is not None and key not in typed:
                    without = f"add ~{key}, which drops what an experiment has set"
                return (
                    f"{key} is not a setting of {group}.kind={error['loc'][1]}: it belongs to "
                    f"{group}={others}; {remedy}, or {without}"
                )
            return unknown_key_message(key)
        case "missing" if key in _SECTIONS:
            return f"{key} is not set; choose an option with {key}=NAME"
        case "missing":
            return f"{key} is not set; give it with {key}=VALUE"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = ", ".join(_TAGGED[group])
            found = error.get("ctx", {}).get("tag")
            problem = f"{key}.kind={found} is not known" if found else f"{key}.kind is not set"
            return f"{problem} (there are {kinds}); choose an option with {key}=NAME"
        case "dict_type" if key:
            return f"{key}={shown(error['input'])}: must be {MAPPING}"
        case "model_type" | "model_attributes_type" if key:
            option = "" if "." in key else f"choose an option with {key}=NAME or "
            return (
                f"{key}={shown(error['input'])}: {key} is a section, not a value; {option}set one "
                "of its keys"
            )
        case "model_type":
            return "the config is not a mapping of sections to their settings"
        case "value_error":
            text = error["msg"].removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
    return None


def _expectation(error: ErrorDetails) -> str:
    """Return what a value has to be, in words that follow "must be"."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type":
            return "text (a number stays text in two pairs of quotes: \"'7'\")"
        case "string_too_short":
            return "text that is not empty"
        case "tuple_type" | "list_type":
            return LIST
        case "too_short":
            return f"a list of at least {limits['min_length']}"
        case "too_long":
            return f"a list of at most {limits['max_length']}"
        case "greater_than_equal":
            return f"at least {limits['ge']}"
        case "greater_than":
            return f"more than {limits['gt']}"
        case "less_than_equal":
            return f"at most {limits['le']}"
        case "less_than":
            return f"less than {limits['lt']}"
        case "literal_error":
            allowed = limits["expected"].replace("'", "")
            names = allowed.replace(" or ", ", ").split(", ")
            near = _near(str(error["input"]).casefold(), names)
            return allowed + (f" (did you mean {near[0]}?)" if near else "")
        case "string_pattern_mismatch":
            return f"text of the form {limits['pattern']}"
    return error["msg"][0].lower() + error["msg"][1:]


def _near(given: str, names: Sequence[str]) -> list[str]:
    """Return the name that is meant: alike, or the beginning, as in adamw_torch_fused."""
    if close := difflib.get_close_matches(given, names, n=1, cutoff=0.7):
        return close
    return sorted((n for n in names if given.startswith(f"{n}_")), key=len, reverse=True)[:1]


def _sections_of(annotation: Any, *, of_lists: bool = False) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is tuple and not of_lists:  # what a list holds has no key
        return []
    return [s for arg in get_args(annotation) for s in _sections_of(arg, of_lists=of_lists)]


_SECTIONS = {
    name: sections
    for name, field in Sections.model_fields.items()
    if (sections := _sections_of(field.annotation))
}
# The kinds of each section that is a tagged union.
_TAGGED = {
    name: [get_args(section.model_fields["kind"].annotation)[0] for section in sections]
    for name, sections in _SECTIONS.items()
    if len(sections) > 1
}
