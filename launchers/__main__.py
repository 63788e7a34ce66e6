"""The `shardwright` command: find out which command is meant, run it, return its exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from shardwright.train import program
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT, FAILED, INTERRUPTED, UserError
from shardwright.train.process import garbage

COMMANDS = (
    *("train", "plan", "inspect", "sweep", "prepare", "resume", "join", "sample", "checkpoints"),
    *("recover", "evaluate", "push"),
    *("status", "runs", "compare", "watch", "report"),
    *("logs", "diagnose", "cancel", "sync", "data", "doctor"),
    *("translate",),
    *("rank", "relay", "requeue"),
)
"""Each is a module, imported when it is asked for: its `main` is the command."""
IN_JOB_SCRIPTS = ("relay", "requeue")

USAGE = """\
Pretrain masked and causal language models, from a laptop's CPU to many GPUs.

  shardwright train [--dry-run] [group=option] [key=value]
      compose a run, check it and start it; --help lists groups, options and flags,
      --dry-run shows config, engine settings and command, and starts nothing
  shardwright sweep [SWEEP_DIR] [sweep=NAME] [group=option,option] [key=value,value] [--dry-run]
      run each combination, several at a time, each as an ordinary run; the same command again
      continues a sweep that was cut: it skips what is done and resumes the rest
  shardwright plan [group=option] [key=value] hardware=h200x8 [--json]
      memory that such a run would take under each strategy, and which of them fit, on hardware
      that need not be there; --states-only: the model states, as DeepSpeed estimates them
  shardwright plan RUN_DIR [--json]
      what a run was planned to take of memory and time, and what it has taken
  shardwright inspect [group=option] [key=value] [--samples N] [--json]
      what such a run would train on: tokens per byte and word, duplicates, what is cut or padded,
      samples as the model will see them; of a large corpus that is not prepared, an excerpt
  shardwright translate [--json] FILE | -- COMMAND LINE
      the overrides of a DeepSpeed config, of accelerate's config file, or of a command line of
      run_clm.py or run_mlm.py, and what became of each of their keys
  shardwright prepare [--dry-run] [group=option] [key=value]
      put the tokenizer and tokens that such a run would train on into the cache, and start none
  shardwright resume RUN_DIR [--step N] [--dry-run] [group=option] [key=value]
      continue from the newest whole checkpoint, or from that of a step, with other ranks,
      strategy, precision or more steps if asked
  shardwright join RUN_DIR [--node-rank N]
      on each other node of a run over several: start its ranks there
  shardwright sample RUN_DIR --prompt TEXT
      fill masks or continue a text with a trained model; --strategy zero3 or fsdp divides it
      among ranks (--nproc-per-node N) where it does not fit one device
  shardwright checkpoints RUN_DIR [--verify]
      list what a run has saved and whether it is whole; --verify checks every hash
  shardwright recover CHECKPOINT_OR_RUN OUT [--dtype bf16] [--step N] [--dry-run]
      make a Hugging Face model directory of whole weights out of any sharded checkpoint, in
      bounded memory; --help lists more flags
  shardwright evaluate RUN_DIR|CHECKPOINT|MODEL_DIR [--step N] [--json] [key=value]
      held-out loss, perplexity and accuracy, by set, without training: what the run itself
      measures, under its strategy and ranks or others
  shardwright push DIR REPO [--public] [--dry-run]
      upload a model directory with its card to a hub, private unless asked otherwise
  shardwright status RUN_DIR|all
      state in the queue, step, loss, tokens per second, time left, newest checkpoint
  shardwright runs [PATH...] [KEY=VALUE...] [--sort KEY] [--json|--csv]
      a table of runs: state, model, strategy, step, losses; filters such as state=done, "loss<3"
  shardwright compare RUN_DIR RUN_DIR... [--json]
      what differs between runs in settings, versions and data, and their curves
  shardwright watch RUN_DIR|SWEEP_DIR
      the progress of what runs elsewhere, until it has ended
  shardwright logs RUN_DIR [--rank N] [--follow]
      what a run shows on its terminal, or its job or one of its ranks prints
  shardwright diagnose RUN_DIR [--json]
      where each rank of a run is, and which one the others wait for, whether it lives, hangs or
      is dead
  shardwright diagnose RUN_DIR --replay STEP | RUN_DIR OTHER_RUN_DIR
      make a step again and name the module that gave NaN; or where two runs part
  shardwright cancel RUN_DIR [--now]
      stop a run after a checkpoint, wherever it runs; --now: at once
  shardwright report RUN_DIR|SWEEP_DIR... [--out FILE.html] [--png DIR]
      one page that is read without a network: curves, what differs, which settings mattered
  shardwright sync RUN_DIR
      send TensorBoard or W&B the metrics of an ended run that they lack
  shardwright data show RUN_DIR [--samples N] [--json]
      what a run trains on: counts, lengths of documents, samples as the model sees them
  shardwright data verify RUN_DIR|--all
      compare the tokens with the hashes that were kept when they were written
  shardwright data clean [--older-than 30d] [--max-bytes 50GB] [--dry-run] [--yes]
      remove from the cache what is left over or long unused; never what a run uses
  shardwright doctor [group=option] [key=value]
      look for what stops or slows training here; with launcher=... on all of its nodes,
      with measured collectives and matrix products
  shardwright help COMMAND
      show its help, as COMMAND --help does

  For launchers and jobs of your own:
  shardwright rank RUN_DIR
      run one of a run's ranks: torchrun --nproc-per-node N --no-python shardwright rank RUN_DIR
  shardwright relay [--grace-seconds S] COMMAND ...
      run torchrun or a similar launcher where signals reach only the top process, and pass
      them on to its ranks
  shardwright requeue RUN_DIR --restarts N
      tell by exit code 0 or 1 whether an interrupted job has made progress and may start again

  shardwright --version

Exit codes
  0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint and meant to be resumed;
  130 interrupted by Ctrl-C where there was nothing to save: before the ranks were started, in a
  command without ranks, or by a second one, which kills; likewise 128 + N by signal N;
  141 the reader of a command's output has closed it, as `head` does

Examples
  shardwright train experiment=demo
  shardwright train model=gpt2_small strategy=zero2 precision=bf16 trainer.max_steps=2000
  shardwright sweep model=gpt2_tiny trainer.learning_rate=1e-4,3e-4 sweep.seeds=3
  shardwright train launcher=slurm launcher.nodes=2 launcher.gpus_per_node=8 model=llama_1b
  shardwright sample runs/demo-20260131-120000 --prompt 'def __init__(self'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return terminal.run(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except UserError as error:
        from shardwright.launchers.messages import error_text

        print(error_text(str(error)), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, MemoryError) as error:
        from shardwright.launchers.messages import error_text
        from shardwright.train.process import exhausted

        if (why := exhausted.explained(error, room="free some space, and try again")) is None:
            raise
        print(error_text(why), file=sys.stderr)
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    match arguments:
        case []:
            print(USAGE, end="", file=sys.stderr)
            return BAD_INPUT
        case ["-h" | "--help" | "help"] | ["help", "-h" | "--help" | "help"]:
            print(USAGE, end="")
            return 0
        case ["-h" | "--help" | "help", command, *_]:
            return _dispatch([command, *["--help"] * (command in COMMANDS)])
        case ["--version" | "-V"]:
            print(f"shardwright {program.version()}")
            return 0
        case ["-sc" | "--shell-completion" | "--shell_completion", *_]:
            from shardwright.launchers.commands import completion

            return completion.main(arguments, COMMANDS, module_of)
        case [command, *rest] if command in COMMANDS:
            with garbage.uncollected():
                module = importlib.import_module(module_of(command))
            code: int = module.main(rest)
            return code
    raise UserError(_unknown(arguments[0]))


def module_of(command: str) -> str:
    """Return where a command is; job scripts of existing runs know some by older names. Pure."""
    folder = "shardwright.launchers"
    return f"{folder}.{command}" if command in IN_JOB_SCRIPTS else f"{folder}.commands.{command}"


def _unknown(command: str) -> str:
    """Say what was probably meant."""
    if "=" in command:
        return f"{command} comes after a command: shardwright train {command}"
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
    there_are = f"there are {', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}"
    hint = f"did you mean {near[0]}?" if near else there_are
    return f"unknown command {command}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
