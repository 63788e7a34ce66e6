"""What a Hydra or OmegaConf exception means to the person who typed the command."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from shardwright.train.config import known_keys, unknown_key_message
from shardwright.train.config.messages import LIST, MAPPING, takes_a_list
from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import RUN_CONFIG

USER_CAUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What composing raises over a wrong override, option or file."""

ROOT_GROUP = "experiment"
"""The group whose files set keys of the whole tree; Hydra knows it as ``experiment@_global_``."""


FREE_FORM = (
    *("strategy.extra", "data.eval_paths", "data.options", "model.overrides"),
    "trainer.custom_options",
)
"""The sections whose keys no file lists."""


def is_free_form(key: str) -> bool:
    """Return whether a dotted key is one that only its reader knows."""
    return any(key == section or key.startswith(f"{section}.") for section in FREE_FORM)


def qualify(override: str) -> str:
    """Return an override as Hydra knows it: ``experiment=demo`` needs its package.

    An experiment's first line is the command that runs it, and Hydra takes a `@package` header from
    the first line only; so config.yaml gives the package, and it is part of the key. A key that the
    chosen option's file does not list is added by `++`: the config's own rules say better than
    Hydra what is wrong with it, if anything.
    """
    override = with_home_quoted(override)
    key = override.lstrip("+").partition("=")[0]
    if is_free_form(key) or ("." in key and key in known_keys()):
        return "++" + override.lstrip("+")
    return re.sub(rf"^([+~]*{ROOT_GROUP})(?==|$)", r"\1@_global_", override)


def with_home_quoted(override: str) -> str:
    """Return an override with quotes around each path that begins with `~`, as Hydra needs.

    What has quotes already is left as it is.
    """
    if "'" in override or '"' in override:
        return override
    return re.sub(r"(?<=[=,\[])(\s*)(~[A-Za-z0-9_/.+*?@%: -]*)(?=$|[,\]])", r"\1'\2'", override)


def check_options(overrides: Sequence[str], groups: Mapping[str, Collection[str]]) -> None:
    """Raise UserError for what Hydra stumbles over, given the options of each group.

    That is an override which does not parse, or the choice of an option that is not a name.
    """
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException:
            raise UserError(unreadable(text, groups)) from None
        group = override.key_or_group
        if group not in groups or override.is_delete() or override.is_sweep_override():
            continue
        if not isinstance(override.value(), str):
            raise UserError(
                f"{override.input_line}: the option of a group is a name; "
                f"`shardwright train --help` lists those of {group}"
            )


def explain(error: Exception) -> str:
    """Return one message that names the key or option, and the remedy."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    match error:
        case OverrideParseException():
            return unreadable(error.override, {})
        case MissingConfigException() if error.missing_cfg_file:
            return _unknown_option(error.missing_cfg_file, list(error.options or []))
        case ConfigCompositionException():
            text = str(error)
            if found := re.search(r"Could not (?:override|delete) '([^'=]+)", text):
                return unknown_key_message(found[1].replace("/", ".").partition("@")[0])
            if found := re.search(r"config group '([^']+)' does not exist", text):
                return unknown_key_message(found[1].replace("/", "."))
            if found := re.search(r"Multiple values for (\S+)\. .*: (\S+)'", text):
                return f"+{found[1]}: this group has an option already; write {found[1]}=NAME"
            if found := re.search(r"Ambiguous value for argument '(.*)'\n1\. To", text, re.S):
                return _ambiguous(found[1])
    # OmegaConf 2.3 words it alike whichever of the two is given (basecontainer.py, merge_with).
    if "Cannot merge DictConfig with ListConfig" in str(cause):
        key = str(getattr(cause, "full_key", "") or "")
        return f"{key}: must be {LIST if takes_a_list(key) else MAPPING}"
    match cause:
        case MissingMandatoryValue():
            return f"{cause.full_key} is not set; give it with {cause.full_key}=VALUE"
        case InterpolationResolutionError():
            return f"{cause.full_key}: {_first_line(cause)}"
        case OmegaConfBaseException() if cause.full_key:
            return f"{cause.full_key}: {_first_line(cause)}"
        case yaml.MarkedYAMLError():
            mark = cause.problem_mark
            where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
            return f"cannot read {where}: {cause.problem}"
    return " ".join(str(cause).split())


PLAIN = re.compile(r"[A-Za-z0-9_/\-\\+.$%*@?|: ]*")
"""A value that needs no quotes, as Hydra 1.3 has it (grammar/OverrideLexer.g4)."""


def unreadable(text: str, groups: Mapping[str, Collection[str]]) -> str:
    """Say why an override does not parse, and what to write; ``groups`` maps to their options."""
    key, equals, value = text.partition("=")
    start = f"cannot read the override {text!r}: "
    if not equals:
        return start + _without_value(text, groups)
    if not re.fullmatch(r"[+~]*[A-Za-z_][A-Za-z0-9_./@:-]*", key):
        return f"{start}an override is key=value, and {key!r} is not a key"
    odd = "".join(dict.fromkeys(char for char in value if not PLAIN.fullmatch(char)))
    general = (
        "a value that holds anything but letters a to z, digits, spaces and / - _ + . : $ % * @ ? "
        "| needs quotes of its own within those of the shell"
    )
    if value[:1] in ("[", "{", "(", "'", '"'):
        closed = "brackets and quotes have to be closed, and within them "
        return f"{start}{closed}{general}, such as \"data.paths=['a#1.txt', 'b.txt']\""
    typed = f"\"{key}='{value}'\""
    if re.search(r"[\"'$`\\!]", value):  # what a shell looks for within double quotes
        literal = value.replace("\\", "\\\\").replace('"', '\\"')
        typed = shlex.quote(f'{key}="{literal}"')
    why = f"{' '.join(odd)} in a value needs quotes" if odd else "the value needs quotes"
    return f"{start}{why}: write {typed} ({general})"


def _without_value(word: str, groups: Mapping[str, Collection[str]]) -> str:
    """Say what to write for a word without "=", which is mostly an option without its group."""
    name = word.strip("-").replace("-", "_")
    if found := [group for group, options in groups.items() if name in options]:
        return f"{name} is an option of {' and of '.join(found)}; write {found[0]}={name}"
    if name in groups:
        return f"{name} is a group; choose an option with {name}=NAME"
    if name in known_keys():
        return f"{name} needs a value: {name}=VALUE"
    if os.path.exists(os.path.expanduser(word)):
        if word.endswith((".yaml", ".yml")):
            return (
                "settings from a file are an experiment: put it into DIR/experiment/NAME.yaml and "
                "write --config-dir DIR experiment=NAME"
            )
        if os.path.isfile(os.path.join(os.path.expanduser(word), RUN_CONFIG)):
            return (
                f"{word} is a run: `shardwright resume {word}` continues it, `shardwright data "
                f"show {word}` shows its data, and model=pretrained model.name={word} begins from "
                "its weights"
            )
        return f"files to train on are given as data=text data.paths=[{word}]"
    if (key := re.split(r"[:\s]", word)[0]) in known_keys():
        return f"an override is key=value, such as {key}=VALUE"
    return f"an override is key=value ({unknown_key_message(name)})"


def is_setting_with_dashes(argument: str) -> bool:
    """Return whether an argument is a key or a group with dashes before it."""
    key = argument[2:].partition("=")[0].replace("-", "_")
    return argument.startswith("--") and (key == ROOT_GROUP or key in known_keys())


def refuse_dashes(arguments: Sequence[str]) -> None:
    """Raise UserError for a setting that is given as a flag, of which a parser knows no more."""
    for argument in arguments:
        if is_setting_with_dashes(argument):
            raise UserError(unknown_flag_message(argument))


def unknown_flag_message(flag: str) -> str:
    """Say what to write in place of a flag that a command does not have."""
    name, _, value = flag.lstrip("-").partition("=")
    key = name.replace("-", "_")
    if is_setting_with_dashes(flag):
        return f"unknown flag {flag}: leave the dashes out and write {key}={value or 'VALUE'}"
    return (
        f"unknown flag {flag}; settings are given as key=value, without dashes "
        f"({unknown_key_message(key)})" + (f" [value given: {value}]" if value else "")
    )


def _unknown_option(path: str, options: list[str]) -> str:
    group, _, option = path.partition("/")  # a name of the hub has a / of its own
    if not group:
        return (
            f"there is no config {path}: --config-name is the name of a whole other tree; for "
            "settings of your own write DIR/experiment/NAME.yaml and give --config-dir DIR "
            "experiment=NAME"
        )
    if not options:
        return f"{group}={option}: there is no config group {group}"
    written, option = option, _OTHER_NAMES.get(group, {}).get(option.casefold(), option.casefold())
    likeness = {name: difflib.SequenceMatcher(None, option, name).ratio() for name in options}
    nearest_first = sorted(options, key=lambda name: (-likeness[name], name))
    begun = sorted(name for name in options if name.startswith(option.replace("-", "_")))
    near = begun or [name for name in nearest_first[:1] if likeness[name] >= 0.5]
    hint = (
        f"did you mean {', '.join(near[:-1])}{' or ' * (len(near) > 1)}{near[-1]}? " if near else ""
    )
    others = [name for name in nearest_first if name not in near]
    elsewhere = _ELSEWHERE.get(group, "").format(written)
    return (
        f"{group}={written}: there is no such option; {hint}there are "
        f"{', '.join([*near, *others])}{elsewhere}"
    )


# What other programs call some options: torch's dtypes, accelerate's words, FSDP's strategies.
_OTHER_NAMES = {
    "precision": {
        **{"float32": "fp32", "full": "fp32", "no": "fp32"},
        **{"float16": "fp16", "half": "fp16", "bfloat16": "bf16"},
    },
    "strategy": {
        **{"full_shard": "fsdp", "shard_grad_op": "fsdp_grad_op", "no_shard": "ddp"},
        **{"hybrid_shard": "fsdp_hybrid", "hybrid_shard_zero2": "fsdp_hybrid_grad_op"},
    },
}
# What else a name behind a group may be meant for.
_ELSEWHERE = {
    "model": "; a model of the hub or in a directory is model=pretrained model.name={}",
    "tokenizer": "; one of the hub or in a directory is tokenizer=pretrained tokenizer.name={}",
    "strategy": "; a config of another program's is strategy=deepspeed_file strategy.path=FILE, or "
    "strategy=accelerate_file",
    "data": "; files of yours are data=text data.paths=[{0}], a data set of the hub is data=hub "
    "data.name={0}",
}


def _ambiguous(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"{override}: a comma separates runs, and one run is requested; add -m for a run with "
        f"each value, or write {key}=[{value}] if a list is meant"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
