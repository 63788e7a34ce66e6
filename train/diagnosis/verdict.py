"""Which rank a run waits for, told from what its ranks have shown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.train.diagnosis import stacks
from shardwright.train.diagnosis.beats import GONE, STOPPED, Beat
from shardwright.train.diagnosis.report import Report
from shardwright.train.process.heartbeat import Phase
from shardwright.train.units import duration


@dataclass(frozen=True)
class Verdict:
    """Who is waited for, and what there is to say about it."""

    culprits: tuple[int, ...]
    """The ranks that the others wait for; none where nobody stands out."""
    text: str
    """One paragraph."""


_Calls = Mapping[int, Mapping[str, Any]]
"""What was called, by its number; or what ranks have called as one number, by rank."""


@dataclass(frozen=True)
class _Wait:
    """A collective that some ranks have called and others have not, or not alike."""

    group: str
    number: int
    members: tuple[int, ...]
    called_by: _Calls

    @property
    def absent(self) -> list[int]:
        return [rank for rank in self.members if rank not in self.called_by]

    @property
    def differs(self) -> bool:
        return len({_kind(entry) for entry in self.called_by.values()}) > 1


def of(reports: Sequence[Report], silent_nodes: Mapping[str, float] | None = None) -> Verdict:
    """Return who is waited for among ranks that do not move.

    ``silent_nodes`` are nodes that show nothing, by how many seconds ago they last did.
    """
    by_rank = {report.beat.rank: report for report in reports if not report.beat.is_ended}
    waits = _waits(by_rank)
    culprits = _culprits(by_rank, waits)
    sentences = [_of_culprit(by_rank[rank]) for rank in culprits]
    for wait in waits:
        if wait.differs:
            sentences.append(_of_difference(wait, by_rank))
    waiting = [rank for rank in by_rank if rank not in culprits]
    sentences += _of_waiting(by_rank, waiting, waits)
    for host, seconds in (silent_nodes or {}).items():
        sentences.append(
            f"Node {host} shows nothing: it was last heard of {duration(seconds)} ago."
        )
    if not culprits and not any(wait.differs for wait in waits) and not silent_nodes and by_rank:
        sentences.insert(0, "No rank stands out: all have called the same collectives.")
    return Verdict(tuple(culprits), " ".join(sentences))


def _culprits(reports: Mapping[int, Report], waits: Sequence[_Wait]) -> list[int]:
    """Return the ranks that are waited for, by the strongest sign that there is."""
    gone = [rank for rank, report in reports.items() if report.beat.is_gone]
    stopped = [rank for rank, report in reports.items() if report.beat.state == STOPPED]
    if gone or stopped:
        return sorted([*gone, *stopped])
    silent = [r for r, report in reports.items() if report.collectives is None]
    if silent and len(silent) < len(reports):
        return sorted(silent)
    absent = {rank for wait in waits for rank in wait.absent if rank in reports}
    # Of two groups, a rank may be absent from one as it waits in the other.
    waiting = {rank for wait in waits if wait.absent for rank in wait.called_by}
    if absent:
        return sorted(absent - waiting or absent)
    if any(wait.differs for wait in waits):
        return []
    in_store = {r for r, x in reports.items() if stacks.waits_for_others(_frames(x))}
    if in_store and len(in_store) < len(reports):
        return sorted(set(reports) - in_store)
    return list(reports) if len(reports) == 1 else []


def _waits(reports: Mapping[int, Report]) -> list[_Wait]:
    """Return, of each group, the first collective that not all of its ranks have called alike.

    Of what a rank that does not answer has called nothing is known.
    """
    called: dict[str, dict[int, _Calls]] = {}
    for rank, report in reports.items():
        for group, found in (report.collectives or {}).items():
            by_number = {entry["number"]: entry for entry in found["called"]}
            called.setdefault(group, {})[rank] = by_number
            for member in found["ranks"]:
                if member in reports and reports[member].collectives is not None:
                    called[group].setdefault(member, {})
    waits = []
    for group, by_rank in sorted(called.items()):
        last = {rank: max(entries, default=0) for rank, entries in by_rank.items()}
        if len(by_rank) < 2 or not any(last.values()):
            continue
        waits += _difference(group, by_rank, last) or _lag(group, by_rank, last)
        if not waits or waits[-1].group != group:
            waits += _not_started(group, by_rank)
    return waits


def _difference(group: str, by_rank: Mapping[int, _Calls], last: Mapping[int, int]) -> list[_Wait]:
    """Return the first collective that all have called, and not alike, as far as they know it."""
    oldest = max(min(entries, default=1) for entries in by_rank.values())
    for number in range(oldest, min(last.values()) + 1):
        wait = _Wait(group, number, tuple(by_rank), _at(by_rank, number))
        if wait.differs and not wait.absent:
            return [wait]
    return []


def _lag(group: str, by_rank: Mapping[int, _Calls], last: Mapping[int, int]) -> list[_Wait]:
    """Return the first collective that some have called and others have not."""
    number = min(last.values()) + 1
    if number > max(last.values()):
        return []
    further = {rank: by_rank[rank] for rank in by_rank if last[rank] >= number}
    # Where it is too long ago for the recorder, the oldest that it knows stands for it.
    at = {rank: entries.get(number, entries[min(entries)]) for rank, entries in further.items()}
    return [_Wait(group, number, tuple(by_rank), at)]


def _at(by_rank: Mapping[int, _Calls], number: int) -> _Calls:
    return {rank: entries[number] for rank, entries in by_rank.items() if number in entries}


def _not_started(group: str, by_rank: Mapping[int, _Calls]) -> list[_Wait]:
    """Return what NCCL has begun on some devices and not on others, whose hosts are further."""
    open_ones = [
        number
        for entries in by_rank.values()
        for number, entry in entries.items()
        if entry["is_waited_for"]
    ]
    if not open_ones:
        return []
    at = _at(by_rank, min(open_ones))
    started = {rank: entry for rank, entry in at.items() if entry["is_started"]}
    return [_Wait(group, min(open_ones), tuple(by_rank), started)] if started else []


# --- in words -----------------------------------------------------------------------------------


def _of_culprit(report: Report) -> str:
    beat = report.beat
    where = f"rank {beat.rank} on node {beat.host}"
    since = duration(beat.still_seconds)
    doing = _doing(beat)
    if beat.state == GONE:
        return f"{_capital(where)} is gone: process {beat.pid} was {doing}."
    text = f"{_capital(where)} never came: for {since} it has been {doing}"
    if beat.state == STOPPED:
        text += f"; its process {beat.pid} is stopped by a signal (state T)"
    place = stacks.place(_frames(report))
    if place is not None:
        text += f", {place}"
    elif beat.state != STOPPED:
        text += f"; process {beat.pid} (state {beat.state}) shows no stack"
    children = [
        f"{found} in process {pid}, which it waits for"
        for pid, child in report.of_children.items()
        if (found := stacks.place(stacks.main_thread(child))) is not None
    ]
    if children and beat.phase == Phase.DATA:
        text += f"; {'; '.join(children)}"
    if report.collectives is None and beat.state != STOPPED and report.stacks:
        text += "; its interpreter does not answer, as something holds its lock"
    return text + "."


def _of_difference(wait: _Wait, reports: Mapping[int, Report]) -> str:
    """Say which ranks have called what as one and the same collective of a group."""
    kinds: dict[str, list[int]] = {}
    for rank, entry in wait.called_by.items():
        kinds.setdefault(_kind(entry), []).append(rank)
    parts = [
        f"{ranks_said(ranks)} on {_nodes(reports[rank].beat.host for rank in ranks)} "
        f"{_verb(ranks, 'calls', 'call')} {kind}"
        f"{_from(wait.called_by[ranks[0]])}"
        for kind, ranks in kinds.items()
    ]
    return (
        f"The ranks are in different collectives: as number {wait.number} of group {wait.group}, "
        f"{', and '.join(parts)}."
    )


def _of_waiting(
    reports: Mapping[int, Report], ranks: Sequence[int], waits: Sequence[_Wait]
) -> list[str]:
    """Say in which collective each of the others waits, and where they stand."""
    left, sentences = list(ranks), []
    for wait in waits:
        here = [rank for rank in left if rank in wait.called_by]
        if not here or wait.differs:
            continue
        entry = wait.called_by[here[0]]
        sentences.append(
            f"{_capital(ranks_said(here))} {_verb(here, 'waits', 'wait')} in {entry['operation']} "
            f"(number {wait.number} of group {wait.group}, {_kind(entry)}{_from(entry)})."
        )
        left = [rank for rank in left if rank not in here]
    by_place: dict[str, list[int]] = {}
    for rank in left:
        if any(rank in wait.called_by for wait in waits if wait.differs):
            continue
        beat = reports[rank].beat
        place = stacks.place(_frames(reports[rank])) or f"in state {beat.state}"
        said = f"{_doing(beat)}, {place}{_last_called(reports[rank])}"
        by_place.setdefault(said, []).append(rank)
    for said, there in by_place.items():
        sentences.append(f"{_capital(ranks_said(there))} {_verb(there, 'is', 'are')} {said}.")
    return sentences


def _doing(beat: Beat) -> str:
    phase = Phase(beat.phase)
    return phase.said if phase is Phase.STARTING else f"{phase.said} of step {beat.step}"


def _last_called(report: Report) -> str:
    """Say which collective a rank has called last, in whichever group it did so."""
    ends = [
        (group, found["called"][-1])
        for group, found in (report.collectives or {}).items()
        if found["called"]
    ]
    said = [f"{_kind(entry)} (number {entry['number']} of group {group})" for group, entry in ends]
    return f"; the last collective that it has called is {' and '.join(said)}" if said else ""


def _kind(entry: Mapping[str, Any]) -> str:
    """Return what all ranks have to call alike."""
    if entry["operation"] not in ("all_reduce", "allreduce", "reduce", "_allreduce_base"):
        return str(entry["operation"])
    sizes = " and ".join("x".join(map(str, size)) or "1" for size in entry["sizes"])
    return f"{entry['operation']} of {sizes}"


def _from(entry: Mapping[str, Any]) -> str:
    frames = [stacks.Frame(file, str(line), name) for file, line, name in entry["frames"]]
    found = stacks.place(frames)
    return f", {found.partition(', which')[0]}" if found is not None else ""


def _frames(report: Report) -> list[stacks.Frame]:
    return stacks.main_thread(report.stacks)


def ranks_said(ranks: Sequence[int]) -> str:
    """Return ranks in words, neighbours as a range."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    said = [str(a) if a == b else f"{a} and {b}" if b == a + 1 else f"{a} to {b}" for a, b in parts]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(said)}"


def _nodes(hosts: Iterable[str]) -> str:
    names = sorted(set(hosts))
    return f"node{'s' * (len(names) > 1)} {', '.join(names)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verb(ranks: Sequence[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def table_rows(beats: Sequence[Beat]) -> list[tuple[str, ...]]:
    """Return rank, node, step, phase, since when and state of each rank, in words."""
    return [
        (
            str(beat.rank),
            beat.host,
            str(beat.step),
            Phase(beat.phase).said,
            "" if beat.is_ended else f"{duration(beat.still_seconds)} ago",
            _STATES.get(beat.state, beat.state) if not beat.is_ended else "ended",
        )
        for beat in sorted(beats, key=lambda beat: beat.rank)
    ]


_STATES = {
    GONE: "gone",
    STOPPED: "stopped by a signal",
    "t": "held by a debugger",
    "R": "runs",
    "S": "waits",
    "D": "waits for a disk",
}
