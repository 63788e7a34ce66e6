"""What runs would be, as `--dry-run` prints it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.strategy import engine_settings


def show(configs: Sequence[RunConfig], here: Machine) -> None:
    """Print the config, the engine's settings and the command of runs that start alike."""
    for config in configs:
        settings = json.dumps(engine_settings(config), indent=2)
        print(f"# {config.run_dir}/config.yaml\n{to_yaml(config)}")
        print(f"# engine settings\n{settings}\n")
        if launcher_of(config).queue is None:
            _show_command(config, here)
    if configs and (queue := launcher_of(configs[0]).queue):  # one job, perhaps, for all of them
        print(queue.show(configs), flush=True)


def _show_command(config: RunConfig, here: Machine) -> None:
    """Print what this node's ranks are started with."""
    assert config.run_dir is not None, "resolved"
    environment = rank_environment(config, here, os.environ)
    argv = rank_command(config, Path(config.run_dir), machine=here)
    for name, text in launcher_of(config).files(environment, here).items():
        print(f"# {config.run_dir}/{name}\n{text}")
    print("# environment")
    exports = (f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    print("\n".join(exports))
    print(f"\n# command\n{shlex.join(argv)}", flush=True)
