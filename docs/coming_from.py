"""The chapter for who comes from another program: each name that it knows, and its answer here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from shardwright.train.config.elsewhere.accelerate_launch import ACCELERATE_LAUNCH, EACH_ELSE
from shardwright.train.config.elsewhere.bitsandbytes_config import BITSANDBYTES
from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.elsewhere.example_scripts import EXAMPLE_SCRIPTS
from shardwright.train.config.elsewhere.fsdp_plugin import FSDP_PLUGIN
from shardwright.train.config.elsewhere.row import Row
from shardwright.train.config.elsewhere.trainer_arguments import TRAINER_ARGUMENTS
from shardwright.train.config.elsewhere.trainer_parameters import TRAINER_PARAMETERS
from shardwright.train.config.rules import deepspeed_keys

HEAD = """# Coming from the Trainer, accelerate or DeepSpeed

<!-- Made by `{command}` of train/config/elsewhere/ and of what DeepSpeed reads: edit those. -->

Each argument and key that these programs document, and what becomes of it here. Written where \
a key of Shardwright's is expected, a name leads to its row: of `trainer.num_train_epochs=3` it \
says to use `trainer.max_epochs`.

A config or a command line as a whole:

```bash
shardwright translate ds_config.json --ranks 8        # prints `shardwright train ...`
shardwright translate accelerate.yaml --json
shardwright translate -- torchrun --nproc_per_node 8 run_clm.py --fsdp "full_shard auto_wrap" ...
shardwright train strategy=deepspeed_file strategy.path=ds_config.json launcher.nproc_per_node=8
shardwright train strategy=accelerate_file strategy.path=accelerate.yaml
```

`translate` prints the overrides on stdout, ready to be copied, and on stderr a line for each key: \
what it became, that `strategy.extra` hands it to DeepSpeed as it is, why it is ignored, or why \
it is refused. Of a command line the Trainer's own defaults are written out where they are \
others here (its rate of 5e-5 that falls in a line, three epochs, no decay). `auto` is \
what the run's own values make of it.

As a strategy, a file is translated while a run is composed, for any command that composes one. A \
key that is refused, or a value that contradicts one on the command line, is an error that names \
both. `config.yaml` has the plain values, so that no resume reads the file. Accumulation steps \
without `train_batch_size` need the number of ranks: give `launcher.nproc_per_node`, or \
`trainer.global_batch_size`. A sweep may vary it, by `strategy=zero2,deepspeed_file \
strategy.path=FILE` or by `strategy.path=A,B`: the file is of those points alone that read it. It \
is an option of a command line: an experiment cannot choose it.

Each name for itself:

- **field**: what to write instead, keys of a config or options of a group.
- **command**: what to run instead.
- **derived**: nothing to write; what it follows from.
- **left out**: what this project does not do, and why.
"""
_OF_EXTRA = Row("field", "strategy.extra, as it stands in DeepSpeed's JSON")


def chapter(command: str, prose: Callable[[str], str]) -> str:
    """Return the chapter; ``prose`` makes Markdown of a sentence, ``command`` has made it."""
    programs = {
        "Arguments of the Trainer": TRAINER_ARGUMENTS,
        "What the Trainer is constructed with": TRAINER_PARAMETERS,
        "Arguments of run_clm.py and run_mlm.py": EXAMPLE_SCRIPTS,
        "Flags of accelerate launch": {
            **ACCELERATE_LAUNCH,
            **{f"{start}*": row for start, row in EACH_ELSE.items()},
        },
        "Keys of DeepSpeed's JSON": deepspeed(),
        "Fields of FSDP, as accelerate has them": FSDP_PLUGIN,
        "Settings of BitsAndBytesConfig": BITSANDBYTES,
    }
    parts = [HEAD.format(command=command)]
    for title, program in programs.items():
        parts += [f"## {title}\n", *_table(program, prose), ""]
    return "\n".join(parts)


def deepspeed() -> dict[str, Row]:
    """Return all keys of DeepSpeed's that have an answer, by their dotted path."""
    found = dict(DEEPSPEED_JSON)
    found |= {path: Row("field", field) for path, field in deepspeed_keys.OWNED.items()}
    found |= {path: Row("left out", f"it {why}") for path, why in deepspeed_keys.REFUSED.items()}
    found |= dict.fromkeys(_paths(deepspeed_keys.FREE, ""), _OF_EXTRA)
    return dict(sorted(found.items()))


def _paths(section: Mapping[str, object], prefix: str) -> Iterator[str]:
    for key, kind in section.items():
        if isinstance(kind, dict):
            yield from _paths(kind, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _table(program: Mapping[str, Row], prose: Callable[[str], str]) -> Iterator[str]:
    yield "| name | becomes | here |\n|---|---|---|"
    for name, row in program.items():
        yield f"| `{name}` | {row.becomes} | {prose(row.text)} |".replace("\n", " ")
