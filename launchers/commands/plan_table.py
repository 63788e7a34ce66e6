"""What a plan says on a terminal: the table of several runs, the fastest, and what to copy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from shardwright.launchers import columns
from shardwright.launchers.columns import NOTHING, Column
from shardwright.launchers.plan.candidates import Candidate, nodes_needed, usable_bytes
from shardwright.launchers.plan.hardware import GIB, GROUP, Hardware
from shardwright.launchers.plan.peak import Peak
from shardwright.launchers.plan.scan import Plan, Row, rows, varied_keys
from shardwright.launchers.plan.speed import Pace
from shardwright.train.config import ZeroStrategy
from shardwright.train.units import counted, duration, size

MOST_ROWS = 40
"""Of several plans; of one all are shown."""
NO_COLUMN = ("strategy", GROUP)
"""Settings that have a column anyway."""


def lines(plans: Sequence[Plan], width: int | None) -> Iterator[str]:
    """Yield the lines of several plans, at most ``width`` characters wide where that can be."""
    found = rows(plans)
    yield from (textwrap.fill(line, (width or 200) - 1) for line in _head(plans))
    yield ""
    shown = found if len(plans) == 1 else found[:MOST_ROWS]
    yield from columns.table(_columns(plans, shown), width)
    if left := len(found) - len(shown):
        yield f"and {left:,} more, slower or too large; --json has all"
    for problem, names in _problems(plans).items():
        yield "\n" + textwrap.fill(f"not {', '.join(names)}: {problem}", (width or 100) - 1)
    yield from _to_copy(found, width)


def overrides(row: Row) -> list[str]:
    """Return what is to be added to a run's command line. Pure."""
    config, supposed = row.candidate.config, row.plan.hardware
    assert config is not None
    is_on_disk = isinstance(config.strategy, ZeroStrategy) and config.strategy.uses_nvme
    own = ("strategy=", "trainer.micro_batch_size=")
    return [
        f"strategy={row.candidate.strategy}",
        *(["strategy.nvme_path=DIRECTORY"] if is_on_disk else []),
        f"trainer.micro_batch_size={config.trainer.micro_batch_size}",
        *(word for word in row.plan.settings if not word.startswith(own)),
        f"launcher.device={supposed.device}",
        f"launcher.nproc_per_node={supposed.devices}",
        *(
            ["launcher.head_address=HOST", f"launcher.nodes={supposed.nodes}"]
            if supposed.nodes > 1
            else []
        ),
    ]


# --- above the table ------------------------------------------------------------------------------


def _head(plans: Sequence[Plan]) -> Iterator[str]:
    for plan in {plan.hardware_words: plan for plan in plans}.values():
        supposed = plan.hardware
        left = (supposed.memory_bytes - usable_bytes(supposed)) / GIB
        name = f"{plan.hardware_words[0].partition('=')[2]}: " if len(plans) > 1 else ""
        yield (
            f"{name}{supposed.nodes} x {supposed.devices} ranks of "
            f"{usable_bytes(supposed) / GIB:,.1f} GiB usable, {left:,.1f} left to CUDA, NCCL and "
            f"fragments; {supposed.host_memory_gib:,.0f} GiB a host"
        )
    config = next(c.config for plan in plans for c in plan.found if c.config is not None)
    batch = config.trainer.global_batch_size
    length = config.data.tokens_per_sample
    if len(plans) == 1:
        yield (
            f"{counted(config.trainer.samples_per_pass, 'sample')} of {length:,} tokens a "
            f"micro-batch, {batch:,} a step; memory in GiB"
        )
    else:
        yield f"{batch:,} samples of {length:,} tokens a step; memory in GiB"


# --- the table ------------------------------------------------------------------------------------


def _columns(plans: Sequence[Plan], shown: Sequence[Row]) -> list[Column]:
    on_gpus = any(plan.hardware.device == "cuda" for plan in plans)

    def paced(name: str, cell: Callable[[Pace], str], rank: int | None = None) -> Column:
        paces = [row.candidate.pace for row in shown]
        return Column(name, tuple(cell(p) if p else NOTHING for p in paces), rank=rank)

    return [
        *_settings(plans, shown),
        Column("strategy", tuple(row.candidate.strategy for row in shown), is_text=True),
        Column("fits", tuple("yes" if row.fits else "no" for row in shown), is_text=True),
        paced("step, s", lambda pace: seconds(pace.step_seconds)),
        paced("tokens/s", lambda pace: f"{pace.tokens_per_second:,.0f}"),
        paced("MFU", lambda p: NOTHING if p.mfu is None else f"{p.mfu:.1%}", 11),
        paced("to the end", lambda p: _or_nothing(p.run_seconds, duration), 12),
        paced(
            "GPU-hours" if on_gpus else "rank-hours",
            lambda pace: _or_nothing(pace.device_hours, _hours),
            9,
        ),
        *_of_memory(shown),
        paced("checkpoint", lambda pace: size(pace.checkpoint.size_bytes), 8),
        paced("to save, s", lambda pace: seconds(pace.checkpoint.seconds), 2),
    ]


def _of_memory(shown: Sequence[Row]) -> list[Column]:
    def sizes(name: str, of: Callable[[Peak], int], rank: int | None = None) -> Column:
        peaks = [of(r.candidate.peak) if r.candidate.peak else 0 for r in shown]
        cells = tuple(f"{each / GIB:,.1f}" if each else NOTHING for each in peaks)
        return Column(name, cells, rank=rank)

    def of_node(name: str, of: Callable[[Peak], int], rank: int) -> Column:
        on_node = {id(r.candidate.peak): r.plan.hardware.devices for r in shown}
        return sizes(name, lambda peak: of(peak) * on_node[id(peak)], rank)

    return [
        sizes("a device", lambda p: p.device),
        sizes("weights", lambda p: p.states.device.weights, 4),
        sizes("optimizer", lambda p: p.states.device.optimizer + p.updating, 4),
        sizes("gradients", lambda p: p.states.device.gradients + p.reducing, 3),
        sizes("activations", lambda p: p.activations + p.working, 6),
        sizes("loss", lambda p: p.loss, 5),
        sizes(
            "buffers",
            lambda p: (
                p.states.device.buckets
                + p.states.device.kept_whole
                + p.states.device.average
                + p.gathered
            ),
            1,
        ),
        of_node("a host", lambda p: p.host, 7),
        of_node("disk", lambda p: p.disk, 7),
    ]


def _settings(plans: Sequence[Plan], shown: Sequence[Row]) -> Iterator[Column]:
    """Yield a column for each setting in which plans differ."""
    if len({plan.hardware_words for plan in plans}) > 1:
        cells = (" ".join(word.partition("=")[2] for word in r.plan.hardware_words) for r in shown)
        yield Column(GROUP, tuple(cells), is_text=True, least=8)
    for key in varied_keys(plans):
        if key in NO_COLUMN:
            continue
        of_rows = [
            next((w.partition("=")[2] for w in r.plan.settings if w.startswith(f"{key}=")), NOTHING)
            for r in shown
        ]
        yield Column(_SHORT.get(key, key.rpartition(".")[2]), tuple(of_rows), least=6)


_SHORT = {
    "trainer.micro_batch_size": "micro",
    "trainer.checkpoint_activations_every_blocks": "recompute",
    "data.sequence_length": "length",
    "trainer.global_batch_size": "batch",
}
"""What columns of settings are called that a plan is often asked about."""


def seconds(of: float) -> str:
    """Return seconds in three digits or so."""
    return f"{of:,.0f}" if of >= 100 else f"{of:#.3g}"


def _hours(of: float) -> str:
    return f"{of:,.0f}" if of >= 100 else f"{of:,.1f}"


def _or_nothing(value: float | None, shown: Callable[[float], str]) -> str:
    return NOTHING if value is None else shown(value)


# --- below the table ------------------------------------------------------------------------------


def _problems(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """Return who is no run, by the reason."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        for candidate in plan.found:
            if candidate.config is None:
                names = found.setdefault(candidate.problem, [])
                if candidate.strategy not in names:
                    names.append(candidate.strategy)
    return found


def _to_copy(found: Sequence[Row], width: int | None) -> Iterator[str]:
    fitting = [row for row in found if row.fits]
    if not fitting:
        return
    fastest = fitting[0]
    assert fastest.candidate.pace is not None
    told = f"the fastest that fits: {_step(fastest.candidate.pace)}"
    yield "\n" + textwrap.fill(told, (width or 200) - 1)
    yield f"  {' '.join(overrides(fastest))}"
    least = min(fitting, key=lambda row: row.device_bytes)
    if least is not fastest:
        yield (
            f"the least of a device: {least.device_bytes / GIB:,.1f} GiB instead of "
            f"{fastest.device_bytes / GIB:,.1f}"
        )
        yield f"  {' '.join(overrides(least))}"


def _step(pace: Pace) -> str:
    """Say of what a step consists."""
    parts = ", ".join(
        f"{name} {seconds(spent)}" for name, spent in pace.by_category().items() if spent
    )
    hidden = pace.communication_seconds - pace.parts.communication
    beside = f", beside it {seconds(hidden)} of communication" if hidden > 1e-4 else ""
    return f"{seconds(pace.step_seconds)} s a step ({parts}{beside})"


def nothing_fits(plans: Sequence[Plan]) -> str:
    """Say what would be needed. Pure."""
    least = rows(plans)[0]
    supposed, peak, config = least.plan.hardware, least.candidate.peak, least.candidate.config
    assert peak is not None
    assert config is not None
    text = (
        f"nothing fits: the least of a device, {_called(least)}, is "
        f"{peak.device / GIB:,.1f} GiB of {usable_bytes(supposed) / GIB:,.1f}, with "
        f"{peak.host * supposed.devices / GIB:,.1f} GiB of a host's "
        f"{supposed.host_memory_gib:,.0f}"
    )
    enough = _enough_nodes(least.plan.found, supposed)
    if enough:
        name = min(enough, key=lambda strategy: enough[strategy])
        text += f"; strategy={name} fits {enough[name]} such node(s)"
    smaller = []
    if config.trainer.samples_per_pass > 1:
        smaller.append("trainer.micro_batch_size=1")
    if config.trainer.checkpoint_activations_every_blocks is None:
        smaller.append("trainer.checkpoint_activations_every_blocks=1")
    return text + (f"; less takes {' with '.join(smaller)}" if smaller else "")


def _called(row: Row) -> str:
    words = [word for word in row.plan.settings if not word.startswith("strategy=")]
    return " ".join([f"strategy={row.candidate.strategy}", *words])


def _enough_nodes(found: Sequence[Candidate], supposed: Hardware) -> dict[str, int]:
    return {
        each.strategy: nodes
        for each in found
        if (nodes := nodes_needed(each, supposed)) is not None
    }
