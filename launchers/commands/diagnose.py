"""`shardwright diagnose`: where the ranks of a run are, and which one the others wait for."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shardwright.launchers import columns, messages, runs
from shardwright.launchers.columns import Column
from shardwright.train import config as run_config
from shardwright.train.diagnosis import beats, incident, report, verdict
from shardwright.train.diagnosis.beats import GONE, Beat
from shardwright.train.diagnosis.report import Report
from shardwright.train.diagnosis.verdict import Verdict
from shardwright.train.errors import FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.process import heartbeat
from shardwright.train.run_directory import names
from shardwright.train.run_directory.failures import RankFailure, rank_failures

LOCAL_SECONDS = 8.0
"""How long this node's watcher may take before this process looks by itself."""
OTHERS_SECONDS = 20.0
FRESH_SECONDS = 60.0
"""A node's heartbeats that are older than that are no longer written."""
STILL_SECONDS = 5.0
STILL_STEPS = 3
"""A run stands still where no rank has moved for so long, and for as many of its steps."""


@dataclass(frozen=True)
class Found:
    """What there is to say of a run."""

    state: str
    beats: Sequence[Beat]
    verdict: Verdict | None
    """None where all is well."""
    folder: Path | None
    """Where stacks and collectives lie."""


def main(arguments: Sequence[str]) -> int:
    """Print where a run stands; return 0, whatever that is."""
    options = parser().parse_args(arguments)
    run_dir = Path(absolute(options.run_dir))
    found = runs.runs_in(run_dir)
    if found != [run_dir]:
        raise UserError(f"{run_dir} holds {len(found)} runs; give one of them, such as {found[0]}")
    if options.other is not None:
        return compare((run_dir, Path(absolute(options.other))), options.scratch)
    if options.replay is not None:
        return replays(run_dir, options.replay, options.scratch)
    seen = look(run_dir)
    print(as_json(run_dir, seen) if options.json else said(run_dir, seen, _width()))
    return 0


def replays(run_dir: Path, step: int, scratch: Path | None) -> int:
    """Make a step again and say which module failed in it; return 0 where that is known."""
    from shardwright.launchers.diagnosing import replay
    from shardwright.launchers.machine import facts

    prepared = replay.prepare(run_dir, step, scratch)
    print(f"replaying in {prepared.directory}", flush=True)
    came = replay.run(prepared, facts.detect(os.environ))
    if came is None:
        print(f"the replay failed; see {prepared.directory / names.LOGS}", file=sys.stderr)
        return FAILED
    found = replay.finding(prepared.directory)
    for text in replay.said(prepared, run_dir, came, found):
        print("\n".join(messages.aligned({"": text}, 0, _width())))
    if found is not None:
        print(f"  ranges: {prepared.directory / names.DIAGNOSIS / found.report}")
    return 0


def compare(compared: tuple[Path, Path], scratch: Path | None) -> int:
    """Say where two runs part; return 0 where that could be found out."""
    from shardwright.launchers.diagnosing import comparison
    from shardwright.launchers.machine import facts

    def say(text: str) -> None:
        print("\n".join(messages.aligned({"": text}, 0, _width())), flush=True)

    is_known = comparison.compare(compared, facts.detect(os.environ), scratch, say)
    return 0 if is_known else FAILED


def _width() -> int | None:
    return messages.terminal_width()


def look(run_dir: Path) -> Found:
    """Have the ranks of a run show themselves where they live; read what they left otherwise."""
    look = runs.look(run_dir, run_config.load(run_dir))
    nodes = beats.nodes(run_dir)
    if not nodes:
        hint = "no rank of it has begun, or an earlier version has trained it"
        return Found(look.state.text, (), Verdict((), f"There are no heartbeats: {hint}."), None)
    if look.state.is_over:
        return _of_ended(run_dir, look.state.text, nodes)
    answers, reports, silent = _shown(run_dir, nodes)
    seen = [each.beat for each in reports]
    if not stands_still(seen) and not silent:
        return Found(look.state.text, seen, None, answers)
    return Found(look.state.text, seen, verdict.of(reports, silent), answers)


def _shown(
    run_dir: Path, nodes: Sequence[beats.NodeBeats]
) -> tuple[Path | None, list[Report], Mapping[str, float]]:
    """Return what ranks show, and the nodes that do not answer, by their silence in seconds."""
    here, now = socket.gethostname(), time.time()
    last = {node.host: now - node.time for node in nodes}
    answers: Path | None = None
    found: dict[str, list[Report]] = {}
    with suppress(OSError):  # another user's run: what lies there is left
        answers = incident.publish(run_dir, incident.new_request(here))
        local = [here] if here in last else []
        found = incident.wait_for(answers, local, LOCAL_SECONDS)
        if here not in found and (ranks := beats.alive_here(run_dir, here)):
            found[here] = report.collect(ranks)
            incident.answer(answers, here, found[here])
        awaited = [host for host, seconds in last.items() if seconds < FRESH_SECONDS]
        found |= incident.wait_for(answers, awaited, OTHERS_SECONDS)
    reports = [each for of_node in found.values() for each in of_node]
    # Of nodes that do not answer, what they wrote down last.
    left = [node for node in nodes if node.host not in found]
    reports += [Report(beat) for node in left for beat in node.beats]
    return answers, reports, {node.host: last[node.host] for node in left}


def stands_still(seen: Sequence[Beat]) -> bool:
    """Return whether no rank moves, or one cannot any more. Pure."""
    working = [beat for beat in seen if not beat.is_ended]
    if any(beat.is_gone or beat.state == beats.STOPPED for beat in working):
        return True
    steps = [STILL_STEPS * beat.longest_step_seconds for beat in working]
    limit = max([STILL_SECONDS, *steps])
    return bool(working) and all(beat.still_seconds > limit for beat in working)


def _of_ended(run_dir: Path, state: str, nodes: Sequence[beats.NodeBeats]) -> Found:
    """Return how a run that is over has ended, by what its ranks and watchers left."""
    seen = [_as_it_is_now(beat) for node in nodes for beat in node.beats]
    failures = rank_failures(run_dir)
    hang = messages.hang_of(failures)
    since = max(node.time for node in nodes)
    folder = _last_folder(run_dir, since)
    if hang is not None:
        return Found(state, seen, Verdict((hang.rank,), hang.message), folder)
    if failures:
        return Found(state, seen, _of_failure(failures, seen), folder)
    if all(beat.is_ended for beat in seen):
        return Found(state, seen, None, folder)
    return Found(state, seen, verdict.of([Report(beat) for beat in seen]), folder)


def _of_failure(failures: Sequence[RankFailure], seen: Sequence[Beat]) -> Verdict:
    """Return which rank failed first, and which were killed without a word before. Pure."""
    first = failures[0]
    killed = [b for b in seen if b.is_gone and b.rank not in {f.rank for f in failures}]
    what = (first.explanation or f"{first.kind}: {first.message}").partition("\n")[0]
    text = f"Rank {first.rank} on node {first.host} failed first: {what}."
    if killed:
        ranks = [beat.rank for beat in killed]
        text = verdict.of([Report(beat) for beat in killed]).text + f" {text}"
        return Verdict(tuple(ranks), text)
    return Verdict((first.rank,), text)


def _as_it_is_now(beat: Beat) -> Beat:
    """Return a heartbeat that was written down with the state that its process has now."""
    if beat.host != socket.gethostname():
        return beat
    is_there = any(heartbeat.process(beat.pid))
    return beat if is_there else replace(beat, state=GONE)


def _last_folder(run_dir: Path, since: float) -> Path | None:
    folders = [path for path in incident.all_answers(run_dir) if path.stat().st_mtime > since - 600]
    return folders[-1] if folders else None


# --- as text --------------------------------------------------------------------------------------


def said(run_dir: Path, found: Found, width: int | None) -> str:
    """Return what was found as text. Pure."""
    lines = [f"{run_dir}: {found.state.partition(chr(10))[0]}"]
    if found.beats:
        lines += ["", *table(found.beats, width)]
        lines += by_node(found.beats, width)
    if found.verdict is None:
        what = "every rank has ended" if all(b.is_ended for b in found.beats) else "ranks move"
        lines += ["", what]
    else:
        lines += ["", *messages.aligned({"": found.verdict.text}, 0, width)]
    if found.folder is not None:
        lines += [f"  stacks: {found.folder}/{names.stacks(0).replace('0', 'N', 1)}"]
    return "\n".join(lines)


def table(seen: Sequence[Beat], width: int | None) -> list[str]:
    """Return where each rank is, as a table. Pure."""
    head = ("rank", "node", "step", "where", "moved", "process")
    rows = verdict.table_rows(seen)
    texts = {"node": 8, "where": 16, "process": 8}
    found = [
        Column(
            name,
            tuple(cells),
            is_text=name in texts,
            least=texts.get(name),
            rank=0 if name == "process" else None,
        )
        for name, *cells in zip(head, *rows, strict=True)
    ]
    return columns.table(found, width)


def by_node(seen: Sequence[Beat], width: int | None) -> list[str]:
    """Return what steps were spent on between the last two log lines, by node. Pure."""
    nodes: dict[str, list[Beat]] = {}
    for beat in seen:
        if beat.compute_seconds:
            nodes.setdefault(beat.host, []).append(beat)
    if not nodes:
        return []
    head = ("node", "ranks", "computes", "waits for others", "waits for data", "slowest")
    rows = []
    for host, there in sorted(nodes.items()):
        medians = [
            statistics.median(getattr(beat, name) for beat in there)
            for name in ("compute_seconds", "wait_seconds", "data_seconds")
        ]
        slowest = max(there, key=lambda beat: beat.compute_seconds + beat.data_seconds)
        took = 1000 * (slowest.compute_seconds + slowest.data_seconds)
        parts = [f"{1000 * seconds:,.0f} ms" for seconds in medians]
        rows.append((host, str(len(there)), *parts, f"rank {slowest.rank}, {took:,.0f} ms"))
    found = [
        Column(name, tuple(cells), is_text=name in ("node", "slowest"), rank=rank)
        for rank, (name, *cells) in enumerate(zip(head, *rows, strict=True))
    ]
    found[0] = replace(found[0], rank=None, least=8)
    return ["", "of each step, by the median rank of a node", *columns.table(found, width)]


def as_json(run_dir: Path, found: Found) -> str:
    """Return the same for programs. Pure."""
    ranks = [
        {**asdict(beat), "phase": heartbeat.Phase(beat.phase).name.lower()} for beat in found.beats
    ]
    tree = {
        "run_dir": str(run_dir),
        "state": found.state,
        "ranks": ranks,
        "culprits": list(found.verdict.culprits) if found.verdict else [],
        "verdict": found.verdict.text if found.verdict else None,
        "folder": str(found.folder) if found.folder else None,
    }
    return json.dumps(tree, indent=1)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright diagnose`."""
    found = argparse.ArgumentParser(
        prog="shardwright diagnose",
        description="Show where each rank of a run is, and say which one the others wait for, in "
        "which collective, and where its code stands. The run may live, hang or be dead, and it "
        "does not matter which node this is or what has started it: the ranks of other nodes are "
        "asked by a file in RUN_DIR. What they show, Python stacks and collectives, is kept in "
        f"RUN_DIR/{names.DIAGNOSIS}. A run that lives is not disturbed.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR")
    found.add_argument(
        "other",
        nargs="?",
        metavar="OTHER_RUN_DIR",
        help="another run: instead, find the first step and the first module where both part, by "
        "what they logged and by making that step again",
    )
    found.add_argument("--json", action="store_true", help="for programs")
    found.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="instead, make the steps up to this one again, from the newest checkpoint before it, "
        "on this machine and in a directory of their own, and name the first module that gave what "
        "is not finite",
    )
    found.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where that directory is made; default: /tmp"
    )
    return found
