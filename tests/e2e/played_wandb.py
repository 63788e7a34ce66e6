"""`shardwright` with W&B's own agent and a server of W&B's that is played: nothing leaves here.

python -m tests.e2e.played_wandb TRIALS.json sweep ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import wandb
import wandb.agents.pyagent
import wandb.apis.public.sweeps

from shardwright.launchers.__main__ import main


def play(trials: list[dict[str, Any]]) -> None:
    """Have W&B's agent get its trials from a list, and hear of no server."""
    waiting = [(f"trial{number}", each) for number, each in enumerate(trials)]

    def heartbeat(
        api: Any, agent: str, metrics: Any, running: dict[str, bool]
    ) -> list[dict[str, Any]]:
        if running:
            return []
        if not waiting:
            return [{"type": "exit"}]
        name, parameters = waiting.pop(0)
        arguments = {key: {"value": value} for key, value in parameters.items()}
        return [{"type": "run", "run_id": name, "args": arguments}]

    replaced: list[tuple[Any, str, Any]] = [
        (wandb, "sweep", lambda sweep, entity=None, project=None: "played"),
        (wandb, "Api", lambda: None),
        (wandb.sdk.wandb_login, "_login", lambda **given: None),
        (wandb.apis.public.sweeps, "_register_agent", lambda *given, **named: {"id": "agent"}),
        (wandb.apis.public.sweeps, "_agent_heartbeat", heartbeat),
        (wandb.agents.pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.1),
    ]
    for where, name, what in replaced:
        setattr(where, name, what)


if __name__ == "__main__":
    play(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(main(sys.argv[2:]))
