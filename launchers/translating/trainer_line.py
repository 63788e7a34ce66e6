"""Command lines of the Trainer's scripts, run_clm.py and run_mlm.py, become overrides. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwright.launchers.translating import deepspeed_json, fsdp_fields
from shardwright.launchers.translating.accelerate_yaml import Reader
from shardwright.launchers.translating.starting import Started
from shardwright.launchers.translating.translation import Translation, is_on
from shardwright.train.config.elsewhere.example_scripts import EXAMPLE_SCRIPTS
from shardwright.train.config.elsewhere.trainer_arguments import TRAINER_ARGUMENTS
from shardwright.train.config.optimizers import OPTIMIZERS, OptimizerName
from shardwright.train.errors import UserError

_OF_THE_TRAINER = {
    "learning_rate": ("5e-5", ("trainer.learning_rate",)),
    "lr_scheduler_type": ("linear", ("trainer.lr_scheduler",)),
    "weight_decay": ("0.0", ("trainer.weight_decay",)),
    "adam_beta2": ("0.999", ("trainer.adam_beta2",)),
    "num_train_epochs": ("3.0", ("trainer.max_epochs", "trainer.max_steps")),
    "per_device_train_batch_size": ("8", ("trainer.micro_batch_size",)),
    "seed": ("42", ("seed",)),
}
"""Defaults of the Trainer (5.23) that decide what is learned and are others here, with the keys
that say the same."""


_CADENCES = {"eval": "eval", "save": "save", "logging": "log"}
"""How flags call what comes every so often, and what it is called here."""
_PUSHED = {
    "end": "final",
    "every_save": "save",
    "checkpoint": "checkpoints",
    "all_checkpoints": "checkpoints",
}
"""What is pushed and when, by the Trainer's hub_strategy."""

_OPTIMIZERS: dict[str, OptimizerName] = {
    r"adamw_(torch|hf|apex|anyprecision).*": "adamw",
    r"adafactor": "adafactor",
    r"adamw_(bnb_8bit|8bit|torch_8bit)|paged_adamw_8bit": "adamw_8bit",
    r"(paged_)?lion.*": "lion",
    r"sgd": "sgd",
    r"muon": "muon",
}


def _optimizer_of(optim: Any) -> OptimizerName | None:
    """Return what the Trainer's --optim is called here. Pure."""
    return next(
        (k for pattern, k in _OPTIMIZERS.items() if re.fullmatch(pattern, str(optim))), None
    )


def arguments(words: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a script, as values. Raises UserError for a word that is none's."""
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if match := re.fullmatch(r"--([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            found[name] = True if match[2] is None else value_of(match[2])
        elif name is None:
            raise UserError(f"{word} belongs to no flag of the script; give its flags as --name")
        elif found[name] is True:
            found[name] = value_of(word)
        else:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*before, value_of(word)]
    return found


def value_of(text: str) -> Any:
    """Return a word of a command line as the type that it looks like."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def translate(script: str, flags: Mapping[str, Any], started: Started, read: Reader) -> Translation:
    """Return what becomes of a script's flags, and of what starts it."""
    found = started.found
    masked = "mlm" in script
    if masked or "clm" in script:
        found.sets("script", script, f"objective={'mlm' if masked else 'clm'}")
    else:
        found.ignores("script", script, "which objective it has nobody says: objective=clm or mlm")
    line = _Line(found, dict(flags), read, started.ranks)
    for name, value in flags.items():
        line.flag(name, value)
    for name, (text, keys) in _OF_THE_TRAINER.items():
        if not {*keys} & {*found.overrides}:
            line.default(name, value_of(text))
    line.finish()
    return found


class _Line:
    """The flags of a script, one after the other; some are read together."""

    def __init__(self, found: Translation, flags: dict[str, Any], read: Reader, ranks: int) -> None:
        self._found, self._flags, self._read, self._ranks = found, flags, read, ranks
        self._by_name: dict[str, Callable[[str, Any], None]] = {
            **dict.fromkeys(("bf16", "fp16", "tf32"), self._half),
            **dict.fromkeys(("dtype", "torch_dtype"), self._dtype),
            **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), self._when),
            **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), self._every),
            **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), self._blocks),
            "deepspeed": self._deepspeed,
            "fsdp": self._fsdp,
            "fsdp_config": self._fsdp_config,
            "gradient_accumulation_steps": self._accumulation,
            "lr_scheduler_type": self._schedule,
            "warmup_steps": self._warmup,
            "optim": self._optimizer,
            **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), self._adam),
            "num_train_epochs": self._epochs,
            "max_steps": self._steps,
            "report_to": self._trackers,
            "metric_for_best_model": self._metric,
            "load_best_model_at_end": self._best,
            "auto_find_batch_size": self._batch,
            "ddp_bucket_cap_mb": self._bucket,
            "save_on_each_node": self._node_local,
            "torch_compile": self._compile,
            "use_cpu": self._cpu,
            "model_name_or_path": self._pretrained,
            "model_type": self._type,
            "config_name": self._config,
            "config_overrides": self._overrides,
            "tokenizer_name": self._tokenizer,
            "model_revision": self._revision,
            "trust_remote_code": self._trust,
            "dataset_name": self._dataset,
            "dataset_config_name": self._dataset_config,
            "train_file": self._files,
            "validation_file": self._held_out,
            "validation_split_percentage": self._split,
            "streaming": self._streaming,
            **dict.fromkeys(("block_size", "max_seq_length"), self._length),
            "pad_to_max_length": self._padding,
            "output_dir": self._directory,
            "use_liger_kernel": self._fused,
            "cache_dir": self._cache,
            "push_to_hub": self._push,
            **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_private_repo"), self._of_push),
            "bf16_full_eval": self._evaluated_in,
            "fp16_full_eval": self._evaluated_in,
        }

    @property
    def has_steps(self) -> bool:
        steps = self._flags.get("max_steps")
        return isinstance(steps, int) and steps > 0

    def default(self, name: str, value: Any) -> None:
        """Note what the Trainer does where the command line does not say."""
        self._flags[name] = value
        before = len(self._found.entries)
        self.flag(name, value)
        for index in range(before, len(self._found.entries)):
            entry = self._found.entries[index]
            text = f"{entry.text} (the Trainer's default)"
            self._found.entries[index] = type(entry)(entry.key, entry.value, entry.outcome, text)

    def flag(self, name: str, value: Any) -> None:
        if (handler := self._by_name.get(name)) is not None:
            handler(name, value)
            return
        row = TRAINER_ARGUMENTS.get(name) or EXAMPLE_SCRIPTS.get(name)
        self._found.by_row(name, value, row, "neither the Trainer nor its scripts have this flag")

    def finish(self) -> None:
        """Note what follows from several flags, and what none of them has said."""
        micro, steps = (
            self._flags.get(name)
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        if isinstance(micro, int) and "trainer.global_batch_size" not in self._found.overrides:
            steps = steps if isinstance(steps, int) else 1
            self._found.sets(
                "per_device_train_batch_size x gradient_accumulation_steps x ranks",
                f"{micro} x {steps} x {self._ranks}",
                trainer__global_batch_size=micro * steps * self._ranks,
            )

    # --- how it is trained ------------------------------------------------------------------------

    def _half(self, name: str, value: Any) -> None:
        if value is True:
            self._found.sets(name, value, f"precision={name}")
        else:
            self._found.ignores(name, value, "off")

    def _dtype(self, name: str, value: Any) -> None:
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        if value == "auto":
            self._found.ignores(name, value, "weights are trained in fp32, by precision")
        elif value in names:
            self._found.sets(name, value, f"precision={names[value]}")
        else:
            self._found.refuses(name, value, f"there are {', '.join(names)}")

    def _evaluated_in(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "evaluations are in the dtype of the training")

    def _when(self, name: str, value: Any) -> None:
        if value == "epoch":
            key = _CADENCES[name.removesuffix("_strategy")]
            self._found.sets(name, value, **{f"trainer__{key}_every_epochs": 1})
        else:
            self._found.ignores(name, value, "how often says the number of steps")

    def _every(self, name: str, value: Any) -> None:
        kind = name.removesuffix("_steps")
        key = _CADENCES[kind]
        strategy = self._flags.get(f"{kind}_strategy", "no" if kind == "eval" else "steps")
        if strategy in ("no", "epoch"):
            self._found.ignores(name, value, f"{kind}_strategy is {strategy}")
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            self._found.sets(name, value, **{f"trainer__{key}_every_steps": value})
        else:
            self._found.refuses(name, value, "a share of the run: give a number of steps")

    def _blocks(self, name: str, value: Any) -> None:
        if is_on(value):
            self._found.sets(name, value, trainer__checkpoint_activations_every_blocks=1)
        else:
            self._found.ignores(name, value, "off")

    def _deepspeed(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "its keys follow")
        tree = _json(name, value, self._read)
        translated = deepspeed_json.translate(tree, self._ranks)
        self._found.absorbs(translated, f"{name}:")

    def _fsdp(self, name: str, value: Any) -> None:
        words = value if isinstance(value, list) else str(value).split()
        if value in (True, False, "") or not words:
            if value is True:
                self._found.sets(name, value, "strategy=fsdp")
            else:
                self._found.ignores(name, value, "off")
            return
        fields: dict[str, Any] = {}
        for word in words:
            if word == "offload":
                fields["cpu_offload"] = True
            elif word != "auto_wrap":
                fields["sharding_strategy"] = word
        fsdp_fields.translate(self._found, fields, f"{name}:")
        if "auto_wrap" in words:
            self._found.ignores(f"{name}:auto_wrap", True, "units are blocks, by strategy.wrap")

    def _fsdp_config(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "its keys follow")
        fsdp_fields.translate(self._found, _json(name, value, self._read), f"{name}:")

    def _accumulation(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "trainer.global_batch_size decides, which follows")

    def _schedule(self, name: str, value: Any) -> None:
        names = {
            **{each: each for each in ("linear", "cosine", "constant", "inverse_sqrt")},
            **{each: each for each in ("polynomial", "cosine_with_restarts")},
            "constant_with_warmup": "constant",
            "warmup_stable_decay": "warmup_stable_decay",
            "cosine_with_min_lr": "cosine",
        }
        if value in names:
            self._found.sets(name, value, f"trainer.lr_scheduler={names[value]}")
        else:
            self._found.refuses(name, value, f"there are {', '.join(names)}")

    def _warmup(self, name: str, value: Any) -> None:
        if isinstance(value, float) and 0 < value < 1:
            self._found.sets(name, value, trainer__warmup_fraction=value)
        else:
            self._found.sets(name, value, trainer__warmup_steps=int(value))

    def _optimizer(self, name: str, value: Any) -> None:
        kind = _optimizer_of(value)
        if kind is None:
            there_are = ", ".join(dict.fromkeys(_OPTIMIZERS.values()))
            self._found.refuses(name, value, f"there are {there_are}")
        else:
            self._found.sets(name, value, f"trainer.optimizer={kind}")

    def _adam(self, name: str, value: Any) -> None:
        kind = _optimizer_of(self._flags.get("optim", "adamw_torch")) or "adamw"
        if OPTIMIZERS[kind].runs_adamw:
            self._found.sets(name, value, **{f"trainer__{name}": value})
        elif kind == "lion" and name != "adam_epsilon":  # the Trainer hands it the same betas
            self._found.sets(name, value, **{f"trainer__{name.replace('adam', 'lion')}": value})
        else:
            self._found.ignores(name, value, f"trainer.optimizer={kind} has no such setting")

    def _epochs(self, name: str, value: Any) -> None:
        if self.has_steps:
            self._found.ignores(name, value, "max_steps comes before it")
        else:
            given = {"trainer__max_epochs": float(value), "trainer__max_steps": None}
            self._found.sets(name, value, **given)

    def _steps(self, name: str, value: Any) -> None:
        if self.has_steps:
            self._found.sets(name, value, trainer__max_steps=value)
        else:
            self._found.ignores(name, value, "num_train_epochs decides")

    def _trackers(self, name: str, value: Any) -> None:
        words = value if isinstance(value, list) else [value]
        known = [word for word in words if word in ("tensorboard", "wandb", "mlflow", "trackio")]
        if known:
            self._found.sets(name, value, f"tracking={known[0]}")
        else:
            self._found.ignores(name, value, "tracking=none is the default")

    def _metric(self, name: str, value: Any) -> None:
        if value in ("loss", "eval_loss"):
            self._found.sets(name, value, checkpoint__best_metric="eval_loss")
        else:
            self._found.refuses(name, value, "there are eval_loss, eval_perplexity and others")

    def _best(self, name: str, value: Any) -> None:
        if value is True:
            self._found.sets(name, value, checkpoint__export="best")
        else:
            self._found.ignores(name, value, "off")

    def _batch(self, name: str, value: Any) -> None:
        self._found.ignores(
            name, value, "trainer.micro_batch_size=auto chooses one by the plan" if value else "off"
        )

    def _bucket(self, name: str, value: Any) -> None:
        if self._flags.get("fsdp") or self._flags.get("deepspeed"):
            self._found.ignores(name, value, "read under DDP alone")
        else:
            self._found.sets(name, value, strategy__bucket_size_bytes=int(value) * 2**20)

    def _node_local(self, name: str, value: Any) -> None:
        if value is True and self._flags.get("deepspeed"):
            self._found.sets(name, value, strategy__node_local_checkpoints=True)
        else:
            self._found.ignores(name, value, "off")

    def _compile(self, name: str, value: Any) -> None:
        self._found.sets(name, value, trainer__compile=bool(value))

    def _cpu(self, name: str, value: Any) -> None:
        if value is True:
            self._found.sets(name, value, "launcher.device=cpu")
        else:
            self._found.ignores(name, value, "off")

    def _fused(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "trainer.fused_loss is on by itself")

    def _directory(self, name: str, value: Any) -> None:
        self._found.sets(name, value, run_dir=str(value))

    def _push(self, name: str, value: Any) -> None:
        if not is_on(value):
            self._found.ignores(name, value, "off")
            return
        # As the Trainer names it where nobody does.
        own = str(self._flags.get("output_dir", "trainer_output")).rstrip("/").rpartition("/")[2]
        strategy = str(self._flags.get("hub_strategy", "every_save"))
        if strategy not in _PUSHED:
            self._found.refuses(name, value, f"hub_strategy is one of {', '.join(_PUSHED)}")
            return
        given: dict[str, Any] = {
            "checkpoint__push_to": str(self._flags.get("hub_model_id", own)),
            "checkpoint__push_every": _PUSHED[strategy],
        }
        if "hub_private_repo" in self._flags:
            given["checkpoint__push_private"] = is_on(self._flags["hub_private_repo"])
        self._found.sets(name, value, **given)

    def _of_push(self, name: str, value: Any) -> None:
        is_pushed = is_on(self._flags.get("push_to_hub", False))
        self._found.ignores(
            name, value, "read with push_to_hub" if is_pushed else "push_to_hub is off"
        )

    # --- of what ----------------------------------------------------------------------------------

    def _pretrained(self, name: str, value: Any) -> None:
        of_words = self._flags.get("tokenizer_name", value)
        given = {"model__name": str(value), "tokenizer__name": str(of_words)}
        self._found.sets(name, value, "model=pretrained", "tokenizer=pretrained", **given)

    def _type(self, name: str, value: Any) -> None:
        presets = {"gpt2": "gpt2_small", "bert": "bert_base", "roberta": "roberta_base"}
        if "config_name" in self._flags or "model_name_or_path" in self._flags:
            self._found.ignores(name, value, "the config says it")
        elif value in presets:
            self._found.sets(name, value, f"model={presets[value]}")
        else:
            self._found.refuses(
                name, value, "give a directory with its config.json: model=from_config model.name="
            )

    def _config(self, name: str, value: Any) -> None:
        if "model_name_or_path" in self._flags:
            self._found.refuses(name, value, "weights bring a config of their own")
        else:
            self._found.sets(name, value, "model=from_config", model__name=str(value))

    def _overrides(self, name: str, value: Any) -> None:
        if "config_name" not in self._flags:
            self._found.refuses(
                name, value, "sizes of a preset are keys of its own, such as model.hidden_size=512"
            )
            return
        pairs = [pair.partition("=") for pair in str(value).split(",") if pair]
        given = {f"model__overrides__{key}": value_of(text) for key, _, text in pairs}
        self._found.sets(name, value, **given)

    def _tokenizer(self, name: str, value: Any) -> None:
        self._found.sets(name, value, "tokenizer=pretrained", tokenizer__name=str(value))

    def _revision(self, name: str, value: Any) -> None:
        if value == "main":
            self._found.ignores(name, value, "the main branch is the default")
        else:
            given = {"model__revision": str(value), "tokenizer__revision": str(value)}
            self._found.sets(name, value, **given)

    def _trust(self, name: str, value: Any) -> None:
        if value is True:
            given = {"model__trust_remote_code": True, "tokenizer__trust_remote_code": True}
            self._found.sets(name, value, **given)
        else:
            self._found.ignores(name, value, "off")

    def _dataset(self, name: str, value: Any) -> None:
        self._found.sets(name, value, "data=hub", data__name=str(value))

    def _dataset_config(self, name: str, value: Any) -> None:
        self._found.sets(name, value, data__config=str(value))

    def _files(self, name: str, value: Any) -> None:
        if "dataset_name" in self._flags:
            self._found.ignores(name, value, "dataset_name comes before it")
        else:
            paths = value if isinstance(value, list) else [str(value)]
            self._found.sets(name, value, "data=text", data__paths=paths)

    def _held_out(self, name: str, value: Any) -> None:
        self._found.sets(name, value, data__eval_paths={"validation": str(value)})

    def _split(self, name: str, value: Any) -> None:
        self._found.sets(name, value, data__eval_fraction=float(value) / 100)

    def _streaming(self, name: str, value: Any) -> None:
        if value is True:
            self._found.sets(name, value, data__streaming=True)
        else:
            self._found.ignores(name, value, "off")

    def _length(self, name: str, value: Any) -> None:
        self._found.sets(name, value, data__sequence_length=int(value))

    def _padding(self, name: str, value: Any) -> None:
        self._found.ignores(
            name, value, "lines are laid end to end, by data.unpad" if value else "off"
        )

    def _cache(self, name: str, value: Any) -> None:
        self._found.ignores(name, value, "HF_HOME in the environment says it")


def _json(name: str, value: Any, read: Reader) -> Mapping[str, Any]:
    """Return what a flag holds: JSON itself, or the name of a file of it."""
    if str(value).lstrip().startswith("{"):
        try:
            tree = json.loads(str(value))
        except ValueError as error:
            raise UserError(f"--{name} is not JSON: {error}; correct it") from None
        assert isinstance(tree, dict), "it begins with a brace"
        return tree
    return read(str(value))
