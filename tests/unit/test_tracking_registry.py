"""A tracker is a section, an option, a module and a line of the registry, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import CONF
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config.tracking import NoTracking, TrackingConfig, TrackingSection
from shardwright.train.errors import UserError
from shardwright.train.tracking.errors import hidden, in_a_line
from shardwright.train.tracking.handover import Handover
from shardwright.train.tracking.lines import Line, Missing, Tail, points
from shardwright.train.tracking.registry import TRACKERS, tracker_of
from shardwright.train.tracking.tracker import Target, Tracker
from tests.unit.launchers.configs import resolved
from tests.unit.trackers import FIRST, RESUMED, write

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = get_args(get_args(TrackingConfig)[0])
SWEEPS_OF_WANDB = ROOT / "launchers" / "sweep" / "proposers.py"
"""A sweep that W&B proposes belongs to the project of W&B's that its runs go to."""


def test_every_section_has_its_line_and_its_option() -> None:
    assert set(SECTIONS) - {NoTracking} == set(TRACKERS)
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in SECTIONS}
    assert {path.stem for path in (CONF / "tracking").glob("*.yaml")} == kinds


def test_nobody_asks_which_kind_of_tracker_it_is() -> None:
    """Whoever has to know asks the section or the tracker; `none` alone has no process."""
    names = {section.__name__ for section in SECTIONS}
    own = (ROOT / "train" / "config" / "tracking.py", ROOT / "train" / "tracking", SWEEPS_OF_WANDB)
    found = []
    for path in (
        p for room in ("train", "launchers", "benchmarks") for p in (ROOT / room).rglob("*.py")
    ):
        if any(path.is_relative_to(place) for place in own):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare) else ""
            asks = re.search(r"tracking\.kind|tracking\['kind'\]", text) and "'none'" not in text
            if asks or (isinstance(node, ast.Name) and node.id in names):
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow", "sqlalchemy", "trackio"])
def test_of_a_rank_only_a_trackers_own_module_imports_its_library(package: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "train").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
        if name.partition(".")[0] == package
    }
    assert found <= {f"train/tracking/{package}.py"}


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


class LoudTracking(TrackingSection):
    """A tracker that nothing but its own module and the registry know."""

    kind: Literal["loud"]

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        return {"no_such_module": "loud-client", "nor_this": "louder"}

    def problems(self, environment: Mapping[str, str], *, has_key: bool) -> list[str]:
        return ["tracking=loud is too loud"]


class Loud(Tracker[LoudTracking]):
    name = "Loud"
    fails = 0

    def open(self) -> Target:
        self.say("loud")
        return Written(self)


class Written:
    def __init__(self, tracker: Loud) -> None:
        self.tracker = tracker
        self.lines: list[Line] = []

    def write(self, line: Line) -> None:
        if self.tracker.fails:
            self.tracker.fails -= 1
            raise OSError("no answer")
        self.lines.append(line)

    def caught_up(self) -> None: ...

    def finish(self, outcome: str) -> None:
        self.lines.append({"outcome": outcome})

    def discard(self) -> None: ...


@pytest.mark.filterwarnings("ignore:Pydantic serializer:UserWarning")  # it is in no union
def test_a_tracker_of_ones_own_is_asked_wherever_another_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = resolved("local").model_copy(update={"tracking": LoudTracking(kind="loud")})
    message = (
        "^tracking=loud needs the packages loud-client and louder, which are not installed; "
        "`pip install loud-client louder`$"
    )
    with pytest.raises(UserError, match=message):
        preflight.check_machine(run, Machine())
    monkeypatch.setattr(LoudTracking, "packages", TrackingSection.packages)
    with pytest.raises(UserError, match="^tracking=loud is too loud$"):
        preflight.check_machine(run, Machine())

    trackers: dict[Any, Any] = TRACKERS
    monkeypatch.setitem(trackers, LoudTracking, Loud)
    said: list[str] = []
    tracker = tracker_of(run, tmp_path, lambda text, **later: said.append(text), is_offline=False)
    assert isinstance(tracker, Loud)
    write(tmp_path, FIRST)
    handover = Handover(tracker, Tail(tmp_path / "metrics.jsonl"), said.append)
    tracker.fails = 1
    handover.hand_over()
    assert handover.problem == "no answer"
    handover.hand_over()
    assert handover._target is None, "it is not tried again at once"
    handover.finish("stopped")
    assert isinstance(handover._target, Written)
    assert handover._target.lines == [*FIRST, {"outcome": "stopped"}]
    assert handover.problem is None
    assert said == [
        "loud",
        "warning: Loud fails (no answer); training continues, and what is missing there is written "
        "once that is possible again",
    ]


def test_a_point_is_handed_on_once() -> None:
    missing = Missing()
    handed = {(name, x["step"]): v for x in FIRST for name, v in missing.of(x).items()}
    assert handed == {key: value for key, (value, _) in points(FIRST).items()}
    assert [missing.of(x) for x in FIRST] == [{}] * len(FIRST)

    there = points(FIRST).keys() - {("loss", 2)}
    missing = Missing(there)
    new = [missing.of(x) for x in RESUMED]
    assert new[1] == {"loss": 7.0}, "a gap is filled"
    assert [*new[0], *new[2], *new[3]] == [], "what is there is not handed on again"
    assert new[4] == {"samples": 24, "tokens": 1536, "stopped_early": 1.0}


def test_no_key_is_told() -> None:
    keys = {"SOME_API_KEY": "abcdef", "A_TOKEN": "abc", "SOME_NAME": "visible"}
    text = "a visible abcdef of http://me:and-mine@host/path?x=abc and http://host:80/a@b"
    assert hidden(text, keys) == (
        "a visible *** of http://***@host/path?x=abc and http://host:80/a@b"
    )
    assert in_a_line(OSError("one\ntwo\nConsider this")) == "one two"
    assert in_a_line(OSError()) == "OSError"
