"""Which fields are read under a condition only, and which of them a new run sets in vain.

A run that has begun is not asked: some were, when nothing was said of it. What a section or another
rule refuses in any case, also where a config is loaded, is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.train.config.optimizers import FALLING, OPTIMIZERS, OptimizerFields
from shardwright.train.config.section import Section, shown
from shardwright.train.config.sections import Sections


@dataclass(frozen=True)
class When:
    """A condition under which fields are read."""

    holds: Callable[[Sections], bool]
    words: str
    """The condition, as it is typed or in words."""
    found: Callable[[Sections], str]
    """What is there in its place, where it does not hold."""
    remedy: str
    """A setting with which it does."""
    keys: tuple[str, ...]
    """What it asks for; a group stands for its fields."""


def _value(config: Sections, key: str) -> Any:
    """Return the value of a dotted key; None where a section of this kind has no such field."""
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _typed(key: str, value: Any) -> str:
    return f"{key}={shown(value)}"


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _is(key: str, *values: Any) -> When:
    """Return the condition that a key has one of some values."""
    words = f"{key}={_listed([*map(shown, values)])}"
    return When(
        lambda config: _value(config, key) in values,
        words,
        lambda config: _typed(key, _value(config, key)),
        _typed(key, values[0]),
        (key,),
    )


def _given(key: str, remedy: str) -> When:
    """Return the condition that a key has any value but null or nothing."""
    return When(
        lambda config: bool(_value(config, key)),
        f"{key}=...",
        lambda config: _typed(key, _value(config, key)),
        f"{key}={remedy}",
        (key,),
    )


def _has_no_adamw(config: Sections) -> str:
    return f"trainer.optimizer={config.trainer.optimizer}, which has no AdamW"


ADAMW = When(
    lambda config: OPTIMIZERS[config.trainer.optimizer].runs_adamw,
    f"trainer.optimizer={_listed([n for n, facts in OPTIMIZERS.items() if facts.runs_adamw])}",
    _has_no_adamw,
    "trainer.optimizer=adamw",
    ("trainer.optimizer",),
)
EVALUATED = When(
    lambda config: config.data.is_evaluated,
    "held-out documents",
    lambda config: f"data.eval_fraction={config.data.eval_fraction:g} holds out none",
    "data.eval_fraction=0.01",
    ("data.eval_fraction", "data.eval_paths"),
)


def _compiles(config: Sections) -> bool:
    """Return whether blocks may be compiled, as far as is known without the model."""
    trainer = config.trainer
    if trainer.compile != "auto":
        return trainer.compile
    hinders = (
        trainer.offload_activations,
        trainer.debug.looks_into_modules,
        config.strategy.hooks_every_layer,
    )
    return config.launcher.device == "cuda" and not any(hinders)


def _compiles_nothing(config: Sections) -> str:
    trainer = config.trainer
    reasons = {
        f"launcher.device={config.launcher.device}": config.launcher.device != "cuda",
        "trainer.offload_activations=true": trainer.offload_activations,
        "trainer.debug": trainer.debug.looks_into_modules,
        "strategy.stage=3": config.strategy.hooks_every_layer,
    }
    why = " and ".join(reason for reason, is_there in reasons.items() if is_there)
    return f"trainer.compile=auto compiles none with {why}"


COMPILED = When(
    _compiles,
    "compiled blocks",
    _compiles_nothing,
    "trainer.compile=true",
    ("trainer.compile", "trainer.debug", "trainer.offload_activations", "strategy", "launcher"),
)


def _offloads(config: Sections) -> bool:
    return any(place.offload != "none" for place in config.strategy.placement.values())


OFFLOADED = When(
    _offloads,
    "a strategy that offloads",
    lambda config: f"strategy={config.strategy.kind} offloads nothing",
    "strategy=zero2_offload, zero3_offload or fsdp_offload",
    ("strategy",),
)
NVME = When(
    lambda config: config.strategy.uses_nvme,
    "offload_optimizer or offload_parameters=nvme",
    lambda config: "nothing is offloaded to nvme",
    "strategy=zero3_nvme",
    ("strategy",),
)
SEVERAL_RANKS = When(
    lambda config: max(config.launcher.world_sizes) > 1,
    "several ranks",
    lambda config: "there is one",
    "launcher.nproc_per_node=2",
    ("launcher",),
)


def _of_the_hub(key: str) -> When:
    """Return the condition that a name means something on the hub, and no path of this machine."""
    return When(
        lambda config: not str(_value(config, key)).startswith("/"),
        "a name of the hub",
        lambda config: f"{_typed(key, _value(config, key))} is a directory",
        f"{key}=OWNER/NAME",
        (key,),
    )


def _of_files(*endings: str, remedy: str) -> When:
    """Return the condition that there may be files besides those with some endings.

    What a directory or a glob has is not known here.
    """

    def holds(config: Sections) -> bool:
        return not all(path.endswith(endings) for path in getattr(config.data, "paths", [""]))

    return When(
        holds,
        "files that have one",
        lambda config: f"{_typed('data.paths', list(getattr(config.data, 'paths', ())))} has none",
        remedy,
        ("data.paths",),
    )


_TEXT_ENDINGS = tuple(f".txt{packed}" for packed in ("", ".gz", ".bz2", ".xz", ".zst"))
_TABLE_ENDINGS = (".parquet", ".arrow", ".feather")
_STAGES = {
    (1, 2, 3): (
        *("reduce_bucket_elements", "overlap_communication"),
        *("reduce_scatter", "contiguous_gradients"),
    ),
    (1, 2): ("allgather_bucket_elements",),
    (3,): (
        *("prefetch_elements", "persistence_elements", "max_live_elements"),
        *("max_reuse_distance_elements", "sub_group_elements"),
    ),
}
STAGES: dict[str, tuple[int, ...]] = {
    f"strategy.{name}": stages for stages, names in _STAGES.items() for name in names
}
"""The stages of ZeRO at which DeepSpeed 0.19.8 reads a field (runtime/engine.py,
_configure_zero_optimizer)."""
_SEVERAL_NODES = When(
    lambda config: config.launcher.nodes > 1,
    "launcher.nodes=2 or more",
    lambda config: f"launcher.nodes={config.launcher.nodes}",
    "launcher.nodes=2",
    ("launcher.nodes",),
)
_HOSTFILE = _given("launcher.hostfile", "FILE")
_CHOICES: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "trainer.average_weights": {
        ("ema",): ("average_decay",),
        ("ema", "uniform"): ("average_start_step", "average_every_steps", "average_evaluated"),
    },
    "trainer.lr_scheduler": {
        ("warmup_stable_decay",): ("decay_fraction", "decay_shape"),
        ("cosine_with_restarts",): ("cosine_cycles",),
        ("polynomial",): ("polynomial_power",),
        (*FALLING, "range_test"): ("min_learning_rate_ratio",),
    },
    "trainer.on_spike": {
        ("warn", "skip_update", "rollback"): ("spike_factor", "spike_window_steps"),
        ("rollback",): ("max_rollbacks",),
    },
    "trainer.optimizer": {
        (name,): tuple(n for n in OptimizerFields.model_fields if n.startswith(f"{name}_"))
        for name in OPTIMIZERS
    },
}
"""Fields of the trainer that are read with some choices of another one."""

READ: dict[str, When] = {
    "data.dtype": _of_files(*(".npy", *_TABLE_ENDINGS), remedy="data.paths to .bin or .ds files"),
    "data.ids_field": _of_files(
        *(".npy", ".bin", ".idx", ".ds"), remedy="data.paths to .parquet, .arrow or .feather files"
    ),
    "data.max_cut_fraction": _is("data.line_by_line", True),
    "data.revision": _of_the_hub("data.name"),
    "launcher.backend": _HOSTFILE,
    "launcher.backend_arguments": _HOSTFILE,
    "launcher.log_level_other_ranks": SEVERAL_RANKS,
    "launcher.mail_user": _given("launcher.mail_type", "[END,FAIL]"),
    "launcher.max_requeues": _is("launcher.requeue", True),
    "launcher.ssh_port": _HOSTFILE,
    "model.revision": _of_the_hub("model.name"),
    "objective.eval_masking_rate": EVALUATED,
    "precision.initial_loss_scale": _is("precision.compute_dtype", "fp16"),
    "precision.loss_scale_growth_steps": _is("precision.compute_dtype", "fp16"),
    "strategy.max_elements_in_cpu": _is("strategy.offload_parameters", "nvme"),
    "strategy.min_unit_parameters": _is("strategy.wrap", "size"),
    "strategy.nvme_buffer_count": _is("strategy.offload_parameters", "nvme"),
    "strategy.nvme_buffer_elements": _is("strategy.offload_parameters", "nvme"),
    "strategy.pin_memory": OFFLOADED,
    "strategy.prefetch_units": _is("strategy.wrap", "transformer", "size"),
    "tokenizer.revision": _of_the_hub("tokenizer.name"),
    "trainer.compile_backend": COMPILED,
    "trainer.compile_mode": COMPILED,
    "trainer.eval_max_samples": EVALUATED,
    "trainer.eval_micro_batch_size": EVALUATED,
    **{key: _is("strategy.stage", *stages) for key, stages in STAGES.items()},
    **{
        f"strategy.aio.{name}": NVME
        for name in (
            *("block_size_bytes", "queue_depth", "threads", "single_submit", "overlap_events"),
        )
    },
    **{f"trainer.adam_{name}": ADAMW for name in ("beta1", "beta2", "epsilon")},
    **{
        f"trainer.{name}": _is(key, *choices)
        for key, fields in _CHOICES.items()
        for choices, names in fields.items()
        for name in names
    },
}
"""Which fields are read under which condition, where nothing else refuses them."""
OF_KIND: dict[tuple[str, str], When] = {
    ("data.text_field", "text"): _of_files(
        *_TEXT_ENDINGS, remedy="data.paths to files of rows or tables"
    ),
    ("launcher.head_address", "torchrun"): _SEVERAL_NODES,
    ("launcher.head_address", "deepspeed"): _HOSTFILE,
    ("launcher.head_port", "torchrun"): _SEVERAL_NODES,
    ("launcher.rendezvous", "torchrun"): _SEVERAL_NODES,
}
"""The same, of fields that sections of other kinds read in any case."""


def condition_of(key: str, kind: str | None) -> When | None:
    """Return when a field is read in a section of a kind; None: in any case. Pure."""
    return READ.get(key) or OF_KIND.get((key, kind or ""))


def problems(
    given: Sections,
    settled: Sections,
    others: Collection[str] = (),
    typed: Collection[str] = (),
) -> Iterator[str]:
    """Yield a message for each field that is set and that nothing reads. Pure.

    ``settled`` is the config with nothing left open, ``given`` the one before that: it has the
    values that somebody has set. Fields of ``others`` are left alone, and so are those of an
    option's file where a key of the command line, ``typed``, decides that nothing reads them.
    """
    for key, value, default in _fields(given):
        section = getattr(given, key.partition(".")[0])
        when = condition_of(key, getattr(section, "kind", None))
        if when is None or value == default or key in others or when.holds(settled):
            continue
        if _is_left_behind(key, when, typed):
            continue
        yield (
            f"{key}={shown(value)} is read with {when.words} only, but {when.found(settled)}; "
            f"set {when.remedy}, or leave {key}={shown(default)}"
        )


def _is_left_behind(key: str, when: When, typed: Collection[str]) -> bool:
    """Return whether a file sets a field, which the command line has then made unread.

    An option that is typed is a file as well: what it sets itself is to be read with it.
    """
    if any(_is_within(key, word) for word in typed if "." in word):
        return False
    words = [word for word in typed if "." in word or not _is_within(key, word)]
    return any(
        _is_within(word, asked) or _is_within(asked, word) for word in words for asked in when.keys
    )


def _is_within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _fields(config: Section, path: Sequence[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, value and default of each field that has a default, those within others too."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        key = (*path, field.alias or name)
        if isinstance(value, Section):
            yield from _fields(value, key)
        elif not field.is_required():
            yield ".".join(key), value, field.get_default(call_default_factory=True)
