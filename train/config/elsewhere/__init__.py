"""Names of other programs: the Trainer's, accelerate's, DeepSpeed's, bitsandbytes' and more."""

from __future__ import annotations

from shardwright.train.config.elsewhere import accelerate_launch
from shardwright.train.config.elsewhere.bitsandbytes_config import BITSANDBYTES
from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.elsewhere.example_scripts import EXAMPLE_SCRIPTS
from shardwright.train.config.elsewhere.fsdp_plugin import FSDP_PLUGIN
from shardwright.train.config.elsewhere.row import Row
from shardwright.train.config.elsewhere.trainer_arguments import TRAINER_ARGUMENTS
from shardwright.train.config.elsewhere.trainer_parameters import TRAINER_PARAMETERS


def row(name: str) -> Row | None:
    """Return the answer to a name of another program's; None to what is none of them. Pure."""
    programs = (TRAINER_ARGUMENTS, TRAINER_PARAMETERS, EXAMPLE_SCRIPTS, FSDP_PLUGIN, BITSANDBYTES)
    for program in programs:
        if name in program:
            return program[name]
    return DEEPSPEED_JSON.get(name) or accelerate_launch.row(name)
