"""What the launcher tells its user: before a run, after it, and about who failed first."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwright.launchers.machine.facts import Machine
from shardwright.train import program
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig, TrainerConfig, accumulation_steps, rank_layout
from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE, Diverged, Hang
from shardwright.train.process import exhausted, inherited, signals
from shardwright.train.run_directory import choice, stop_note
from shardwright.train.run_directory.failures import RankFailure
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    DATA_JSON,
    FINAL,
    LOGS,
    METRICS,
    TOKENIZER_FOLDER,
    TORCHRUN_LOG,
    rank_log,
)
from shardwright.train.run_directory.stop_note import Stopped

TRACEBACK_LINES = 8


def error_text(message: str) -> str:
    """Return a message for the user as it goes to stderr."""
    return "error: " + message.replace("\n", "\n       ")


def header(
    config: RunConfig,
    choices: Mapping[str, str],
    machine: Machine,
    environment: Mapping[str, str],
    width: int | None = None,
) -> str:
    """Return what a run is, in a few lines; ``choices`` are the options that it was composed of.

    Lines longer than ``width`` characters are continued below their beginning.
    """
    ranks, trainer = config.launcher.world_size, config.trainer
    layout = rank_layout(config.strategy, ranks)
    length = next(
        f"{value:,} {unit}"
        for value, unit in (
            (trainer.max_steps, "steps"),
            (trainer.max_epochs, "epochs"),
            (trainer.max_tokens, "tokens"),
        )
        if value is not None
    )
    precision = choices.get("precision", config.precision.compute_dtype)
    rows = {
        "model": f"{choices.get('model', config.model.kind)}, {config.objective.kind}",
        "weights": config.model.name if config.model.kind == "pretrained" else "none",
        "adapter": _adapter(config),
        "data": f"{choices.get('data', config.data.kind)}, "
        f"{_tokens(config)} a sample, {_documents(config)}",
        "batch": f"{trainer.global_batch_size:,} samples = {trainer.samples_per_pass} x "
        f"{accumulation_steps(trainer, layout)} x {layout.data_parallel_size} rank(s)"
        f"{_batch_warmup(trainer)}; {length}",
        "strategy": f"{choices.get('strategy', config.strategy.kind)}, {precision}",
        "ranks": _ranks(config, ranks),
        "tracking": _tracking(config, machine),
        "env": " ".join(f"{k}={v}" for k, v in environment.items() if not k.startswith("PYTHON")),
        "run dir": str(config.run_dir),
    }
    shown = {name: text for name, text in rows.items() if text != "none"}
    return "\n".join([f"\nshardwright {config.name}", *aligned(shown, 10, width)])


def _ranks(config: RunConfig, count: object) -> str:
    text, ids = (
        f"{count} x {config.launcher.device} ({config.launcher.kind})",
        config.launcher.gpu_ids,
    )
    if ids is None:
        return text
    return f"{text} on GPU{'s' * (len(ids) > 1)} {','.join(map(str, ids))}"


def aligned(rows: Mapping[str, str], name_width: int, width: int | None) -> Iterator[str]:
    """Yield a line for each row, and where it is longer than ``width`` the rest below. Pure.

    Words are kept whole, so that a path can be copied.
    """
    for name, text in rows.items():
        begin = f"  {name:<{name_width}}"
        yield from (
            [begin + text]
            if width is None
            else textwrap.wrap(
                text,
                max(width, 40),
                initial_indent=begin,
                subsequent_indent=" " * len(begin),
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


def _adapter(config: RunConfig) -> str:
    bits = quantization_of(config.model)
    beside = "" if bits == NOT_QUANTIZED else f", beside weights in {bits.removesuffix('bit')} bits"
    return f"{config.adapter.in_words}{beside}"


def _batch_warmup(trainer: TrainerConfig) -> str:
    first, samples = trainer.batch_warmup_from, trainer.batch_warmup_samples
    return "" if first is None else f", from {first:,} on over the first {samples:,} samples"


def terminal_width() -> int | None:
    """Return the columns of the terminal that this process prints to; None where it is none."""
    return terminal.columns()


def _tokens(config: RunConfig) -> str:
    """Return how many tokens a sample has, what a decoder writes of it by itself."""
    read = config.data.tokens_per_sample
    written = config.tokens_per_sample - read
    return f"{read:,} + {written:,} tokens" if written else f"{read:,} tokens"


def _documents(config: RunConfig) -> str:
    data = config.data
    if data.line_by_line:
        return "lines end to end" if data.is_unpadded else "lines padded"
    apart = "documents kept apart" if data.documents_are_kept_apart else "documents see each other"
    return f"{apart}, packed by best fit" if data.packing == "best_fit" else apart


def _tracking(config: RunConfig, machine: Machine) -> str:
    return config.tracking.in_words(
        config.name, os.environ, machine.wandb_mode, has_key=machine.has_wandb_key
    )


def ignored(environment: Mapping[str, str], width: int | None = None) -> str:
    """Return lines of the header about what a run does not take from its environment. Pure.

    They are at most ``width`` columns wide where a word of them fits.
    """
    names = [*inherited.of_ranks(environment), *inherited.of_engine(environment)]
    text = f"{', '.join(sorted(names))}, set in the environment"
    rows = {"ignored": text} if names else {}
    return "".join(f"{line}\n" for line in aligned(rows, 10, width))


def finish(run_dir: Path) -> str:
    """Return where everything of a successful run lies."""
    what = {
        "model": run_dir / FINAL,
        "metrics": run_dir / METRICS,
        "logs": run_dir / LOGS,
        "checkpoints": run_dir / CHECKPOINTS,
    }
    rows = _last_losses(run_dir / METRICS)
    rows |= {name: str(path) for name, path in what.items() if path.exists()}
    rows["try it"] = f"{program.command('sample', str(run_dir))} --prompt '...'"
    return "\ndone\n" + "\n".join(f"  {name:<12}{text}" for name, text in rows.items())


def _last_losses(metrics: Path) -> dict[str, str]:
    """Return the last loss of a run and its last on held-out documents, in words."""
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for text in lines:
        with suppress(ValueError, KeyError, TypeError):  # a full disk has cut it short
            line = json.loads(text)
            for name in ("loss", "eval_loss"):
                if line.get(name) is not None:
                    last[name] = line["step"], line
    rows = {}
    if "loss" in last:
        step, line = last["loss"]
        rows["loss"] = f"{line['loss']:.4f} at step {step:,}"
    if "eval_loss" in last:
        step, line = last["eval_loss"]
        rows["held out"] = f"{line['eval_loss']:.4f} at step {step:,}"
    return rows


def stopped(where: Stopped, run_dir: Path, stopped_by: int | None) -> str:
    """Return where a run has stopped cleanly, and how to resume it.

    ``stopped_by`` is the signal that the launcher got, None where the ranks were asked themselves.
    """
    by = where.reason if stopped_by is None else signals.by_whom(stopped_by)
    text = f"\nstopped at step {where.step} by {by}; {_resume_hint(run_dir)}"
    if where.unsaved is not None:
        newest = Path(where.checkpoint).name if where.checkpoint else "no checkpoint"
        text += f"\n  {newest} is the newest: {where.unsaved}"
    return text


def stopped_early(run_dir: Path, stopped_by: int | None) -> str:
    """Return what is kept where the data were still being prepared, and what a resume does."""
    where = stop_note.read(run_dir)
    if stopped_by is not None:
        by = signals.by_whom(stopped_by)
    else:
        by = where.reason if where is not None else "a signal"
    kept = "nothing of them is kept yet, and a resume prepares them from the beginning"
    if (run_dir / DATA_JSON).is_file():
        kept = "they are whole, and a resume starts the ranks"
    elif (run_dir / TOKENIZER_FOLDER).is_dir():
        kept = (
            "the tokenizer is kept, and of a large corpus the shards that are whole; a resume "
            "packs the rest"
        )
    return f"\nstopped by {by} while the data were being prepared: {kept}; {_resume_hint(run_dir)}"


def preparation_failed(run_dir: Path, code: int) -> str:
    """Return what is left where preparing the data has failed, which has told why."""
    how = f" ({_how_it_ended(code)})" if code < 0 else ""
    return (
        f"preparing the data failed{how}; {run_dir} is kept: "
        f"`{program.command('resume', str(run_dir))}` tries again"
    )


def _resume_hint(run_dir: Path) -> str:
    return f"resume with: {program.command('resume', str(run_dir))}"


# --- failure ------------------------------------------------------------------------------------


def exit_code(child_code: int, failures: Sequence[RankFailure], stopped_by: int | None) -> int:
    """Return the launcher's exit code from its child's and from what the ranks left.

    torchrun turns every code of a rank into 1, hence the files. 128 + signal where the launcher
    was told to stop and the ranks did not say more.
    """
    if child_code == 0:
        return 0
    first = failures[0].kind if failures else None
    if child_code == RESUMABLE or hang_of(failures) is not None:
        return RESUMABLE
    if first == "UserError" or (child_code == BAD_INPUT and not failures):
        return BAD_INPUT
    if stopped_by is not None:
        return 128 + stopped_by
    return FAILED


def failure(
    child_code: int,
    failures: Sequence[RankFailure],
    run_dir: Path,
    stopped_by: int | None,
    launcher_log: str = TORCHRUN_LOG,
    *,
    config: RunConfig | None = None,
) -> str:
    """Return who failed first, why, and the path of its log; of a run also how to resume it.

    ``config`` is the run's; None where the ranks were no run's, and nothing is to be resumed.
    ``launcher_log`` is the file in logs/ that this node's launcher wrote to.
    """
    code = exit_code(child_code, failures, stopped_by)
    logs = run_dir / LOGS
    if (hang := hang_of(failures)) is not None:
        left = "" if config is None else _left_by(run_dir)
        return f"the run hung, and was ended to be resumed:\n{hang.message}\n{left}  logs: {logs}"
    if code == RESUMABLE:
        return f"the ranks have stopped; {_resume_hint(run_dir)}"
    if stopped_by is not None and code != BAD_INPUT:
        by = f"stopped by {signals.by_whom(stopped_by)}"
        if config is None:
            return by
        hint = _resume_hint(run_dir)
        return f"{by} before the ranks could report where; {hint}\n  logs are in {logs}"
    left = "" if config is None else _left_by(run_dir)
    said = _text_of(logs / launcher_log)
    reported = {failure.rank for failure in failures}
    # Its peers report that it is gone, and torchrun may see them end before it has ended them. What
    # NCCL's watchdog aborts, or torchrun ends, is a peer itself.
    of_peers = (-signal.SIGABRT, -signal.SIGTERM)
    killed = [
        rank
        for rank, ended in _ends_in(said)
        if ended < 0 and ended not in of_peers and rank not in reported
    ]
    if failures and not killed:
        first = failures[0]
        log = logs / rank_log(first.rank)
        if first.kind == "UserError":
            return f"{error_text(first.message)}\n  rank {first.rank} on {first.host}, log: {log}"
        if first.kind == Diverged.__name__:
            return f"{error_text(first.message)}\n  log: {log}"
        later = [str(other.rank) for other in failures[1:]]
        last_lines = "\n".join(first.traceback.rstrip().splitlines()[-TRACEBACK_LINES:])
        return (
            f"rank {first.rank} on {first.host} failed first:\n"
            f"{textwrap.indent(first.explanation or last_lines, '    ')}\n"
            + (f"  ranks that failed after it: {', '.join(later)}\n" if later else "")
            + f"{left}  its whole log: {log}"
        )
    if child_code == BAD_INPUT:
        return f"the ranks refused to start; logs are in {logs}"
    why = _unreported_death(child_code, said, killed, config)
    others = ", ".join(map(str, sorted(reported)))
    after = f"  ranks that failed after it: {others}\n" if others else ""
    return f"{why}\n{after}{left}  logs are in {logs}"


def hang_of(failures: Sequence[RankFailure]) -> RankFailure | None:
    """Return what was said of a hang, by which all else that ranks report came about. Pure."""
    is_first = bool(failures) and failures[0].kind == Hang.__name__
    return failures[0] if is_first else None


def _text_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""


def _ends_in(torchrun_log: str) -> list[tuple[int, int]]:
    """Return rank and exit code, negative for a signal, of each that torchrun saw fail. Pure.

    The first to fail comes last.
    """
    found = re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", torchrun_log)
    return [(int(rank), int(code)) for rank, code in found]


def _left_by(run_dir: Path) -> str:
    """Return what there is to resume from, and how."""
    whole = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    newest = whole[-1][1].name if whole else "none, so a resume starts the run from the beginning"
    return (
        f"  newest checkpoint: {newest}\n"
        f"  resume it with: {program.command('resume', str(run_dir))}\n"
    )


def _unreported_death(
    child_code: int, torchrun_log: str, killed: Sequence[int], config: RunConfig | None
) -> str:
    """Say how ranks ended that could not report it themselves; ``killed`` ones come first."""
    if why := _why_nodes_did_not_meet(torchrun_log):
        return why
    if ended := [end for end in _ends_in(torchrun_log) if not killed or end[0] in killed]:
        rank, code = ended[-1]
        text = f"rank {rank} {_how_it_ended(code)} without a report"
    else:
        text = f"the ranks' process {_how_it_ended(child_code)} without a report"
    if "SIGKILL" in text:
        text += "; the kernel does this when memory runs out (see dmesg)"
        if config is not None:
            needs_less = ", or ".join(exhausted.smaller(config, on_gpu=False))
            text += f"\n  less is needed with {needs_less}"
            text += _beside_the_plan(config)
        return text
    # What ranks wrote there before their own logs were open comes before torchrun's comments.
    said = re.split(r"^[EWI]\d{4} .*torch/distributed/", torchrun_log, flags=re.MULTILINE)[0]
    last_lines = "\n".join(said.rstrip().splitlines()[-TRACEBACK_LINES:])
    return f"{text}:\n{textwrap.indent(last_lines, '    ')}" if last_lines else text


def _beside_the_plan(config: RunConfig) -> str:
    """Return what a plan that chose how to train expected of a rank, below what it came to."""
    run_dir = Path(str(config.run_dir))
    chosen = choice.read(run_dir, config)
    if chosen is None:
        return ""
    taken = exhausted.Taken(None, 0 if config.launcher.device == "cuda" else None)
    command = program.command("resume", str(run_dir))
    said = exhausted.beside_the_plan(chosen, taken, command, on_gpu=False)
    return "\n" + textwrap.indent(said, "  ")


def _why_nodes_did_not_meet(torchrun_log: str) -> str | None:
    *before, last = torchrun_log.rstrip().splitlines() or [""]
    if "RendezvousConnectionError" not in last:
        return None
    for line in reversed(before):
        if taken := re.search(r"failed to listen .* port: (\d+).* EADDRINUSE", line):
            return error_text(
                f"launcher.head_port={taken[1]} is taken on this node by another program, or by "
                "another run; choose one that is free"
            )
        if silent := re.search(r"timed out after (\d+)ms while .* to \((.+), (\d+)\)", line):
            return error_text(
                f"nothing answered at launcher.head_address={silent[2]}, "
                f"launcher.head_port={silent[3]} for {int(silent[1]) // 1000} s; check whether "
                "`shardwright train` or `resume` is running on the first node and whether a "
                "firewall lies between, and join again"
            )
    return None


def _how_it_ended(code: int) -> str:
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"
