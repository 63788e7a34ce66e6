"""Which variables of the user's environment go along to where a run's processes start."""

from __future__ import annotations

from collections.abc import Mapping

from shardwright.train.process import inherited

PLACES = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME"),
)
"""Where files are, and no secret: what may stand in a command line or a file."""
_OF_A_MACHINE = (
    *("HOME", "HOSTNAME", "LOGNAME", "MAIL", "SHELL", "TMPDIR", "USER"),
    *("OLDPWD", "PWD", "SHLVL", "_", "COLUMNS", "DISPLAY", "LINES"),
)
_BEGIN_OF_A_MACHINE = ("DBUS_", "SSH_", "TERM", "XDG_RUNTIME_", "XDG_SESSION_")
_OF_DEVICES = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
    "ROCR_VISIBLE_DEVICES",
)
_BEGIN_OF_A_SCHEDULER = ("RAY_", "SLURM_", "SLURMD_")


def places(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those of `PLACES` that are set. Pure."""
    return {name: environment[name] for name in PLACES if name in environment}


def of_the_user(environment: Mapping[str, str]) -> dict[str, str]:
    """Return all that a user's processes have, keys of services too, wherever they start. Pure.

    What is the starting machine's own, or says which devices and ranks there are, is left out.
    """
    own = {*_OF_A_MACHINE, *_OF_DEVICES, *inherited.of_ranks(environment)}
    begin = (*_BEGIN_OF_A_MACHINE, *_BEGIN_OF_A_SCHEDULER)
    return {
        name: value
        for name, value in environment.items()
        if name not in own and not name.startswith(begin)
    }
