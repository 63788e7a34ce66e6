"""What a Hydra or OmegaConf exception means to the person who typed the command."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Sequence

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

from train.config import unknown_key_message
from train.errors import UserError

USER_CAUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What composing raises over a wrong override, option or file."""

ROOT_GROUP = "experiment"
"""The group whose files set keys of the whole tree; Hydra knows it as ``experiment@_global_``."""


FREE_FORM = "strategy.extra"
"""The section whose keys no file lists."""


def is_free_form(key: str) -> bool:
    """Return whether a dotted key is one that only its reader knows."""
    return key == FREE_FORM or key.startswith(f"{FREE_FORM}.")


def qualify(override: str) -> str:
    """Return an override as Hydra knows it: ``experiment=demo`` needs its package.

    An experiment's first line is the command that runs it, and Hydra takes a `@package` header from
    the first line only; so config.yaml gives the package, and it is part of the key. A key that is
    not in any file is added by `++`.
    """
    override = re.sub(rf"^[+]*(?={re.escape(FREE_FORM)}[.=])", "++", override)
    return re.sub(rf"^([+~]*{ROOT_GROUP})(?==|$)", r"\1@_global_", override)


def check_options(overrides: Sequence[str], groups: Container[str]) -> None:
    """Raise UserError where the option chosen of a group is no name, which Hydra stumbles over."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
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
            return (
                f"cannot read the override {error.override!r}: an override is key=value; quote a "
                "value that holds spaces or any of ,=:{}[]()' twice, such as \"key='a, b'\""
            )
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


def unknown_flag_message(flag: str) -> str:
    """Say what to write in place of a flag that `train` does not have."""
    name, _, value = flag.lstrip("-").replace("-", "_").partition("=")
    return (
        f"unknown flag {flag}; settings are given as key=value, without dashes "
        f"({unknown_key_message(name)})" + (f" [value given: {value}]" if value else "")
    )


def _unknown_option(path: str, options: list[str]) -> str:
    group, _, option = path.rpartition("/")
    if not group:
        return f"there is no config {path}"
    if not options:
        return f"{group}={option}: there is no config group {group}"
    likeness = {name: difflib.SequenceMatcher(None, option, name).ratio() for name in options}
    nearest_first = sorted(options, key=lambda name: (-likeness[name], name))
    hint = f"did you mean {nearest_first[0]}? " if likeness[nearest_first[0]] >= 0.5 else ""
    return f"{group}={option}: there is no such option; {hint}there are {', '.join(nearest_first)}"


def _ambiguous(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"{override}: a comma separates runs, and one run is asked for; add -m for a run with each "
        f"value, or write {key}=[{value}] where a list is meant"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
