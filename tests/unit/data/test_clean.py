"""`shardwright data clean`: what goes of a cache, and what nobody may take from a run."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from shardwright.launchers.__main__ import main
from shardwright.launchers.commands import data as command
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.data import prepare
from shardwright.train.data.tokens import uses
from shardwright.train.data.tokens.cache import build_once, find, lock_of, take
from shardwright.train.data.upkeep.clean import (
    BUILDING,
    OPEN,
    Found,
    chosen,
    look,
    remove,
)

MakeConfig = Callable[..., RunConfig]
DAY = 86400.0


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    """As in a process of its own."""
    uses.release()
    yield
    uses.release()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache, seen from a directory without any runs."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "cache"


def entry(root: Path, name: str, days: float = 0, size: int = 100, kind: str = "tokens") -> Path:
    """Build an entry that was last used some days ago, and hold it no more."""

    def build(directory: Path) -> dict[str, Any]:
        (directory / "train-0.uint16").write_bytes(bytes(size))
        return {}

    path = build_once(root / kind, name, build).path
    uses.release()
    used = time.time() - days * DAY
    os.utime(uses.file_of(path.parent, name), (used, used))
    return path


def run_of(tmp_path: Path, name: str, host: str | None = None) -> Path:
    """Return a run that names an entry, and that has opened it."""
    run_dir = tmp_path / "runs of mine" / f"run-{name}"
    run_dir.mkdir(parents=True)
    (run_dir / "data.json").write_text(json.dumps({"tokens": name}))
    file = uses.file_of(tmp_path / "cache" / "tokens", name)
    line = json.dumps({"run_dir": str(run_dir), "host": host or socket.gethostname()})
    file.write_text(f"{line}\n")
    return run_dir


def clean(root: Path, *arguments: str) -> int:
    return main(["data", "clean", "--cache-dir", str(root), *arguments])


def names(root: Path, kind: str = "tokens") -> list[str]:
    return sorted(p.name for p in (root / kind).iterdir() if p.is_dir())


def test_the_oldest_go_first_and_no_more_than_is_asked() -> None:
    def thing(name: str, days: float, size: int, **more: Any) -> Found:
        return Found(Path(name), size, -days * DAY, **more)

    found = [
        thing("old", 40, 10),
        thing("used", 50, 1000, kept_for="a run uses it"),
        thing("older", 45, 10),
        thing("new", 1, 10),
        thing("left", 0, 5, is_left_over=True),
        thing("being built", 0, 5, is_left_over=True, kept_for=BUILDING),
    ]

    def removed(**rules: Any) -> list[str]:
        return [f.path.name for f in chosen(found, now=0, **rules)]

    assert removed() == ["left"]
    assert removed(older_than_seconds=30 * DAY) == ["older", "old", "left"]
    assert removed(max_bytes=1030) == ["older", "left"]
    assert removed(max_bytes=1035) == ["left"]
    assert removed(max_bytes=0) == ["older", "old", "new", "left"]
    assert removed(max_bytes=1015, older_than_seconds=42 * DAY) == ["older", "old", "left"]


def test_what_is_old_is_removed_with_its_note(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry(root, "aa", days=31)
    entry(root, "bb", days=29)
    entry(root, "cc", days=31, kind="downloads")
    assert clean(root, "--older-than", "30d", "--dry-run") == 0
    assert (names(root), names(root, "downloads")) == (["aa", "bb"], ["cc"])
    said = capsys.readouterr().out
    assert "  remove" in said
    assert clean(root, "--older-than", "30d", "--yes") == 0
    assert (names(root), names(root, "downloads")) == (["bb"], [])
    assert not uses.file_of(root / "tokens", "aa").exists()
    assert uses.file_of(root / "tokens", "bb").exists()
    assert capsys.readouterr().out.startswith(said)


def test_a_run_keeps_its_tokens_until_it_is_gone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry(root, "aa", days=99)
    run_dir = run_of(tmp_path, "aa")
    assert clean(root, "--max-bytes", "0", "--yes") == 0
    assert names(root) == ["aa"]
    said = capsys.readouterr().out
    assert f"tokens/aa  ({run_dir} uses it)\n" in said
    assert "that is more than 0 B: the rest is in use\n" in said
    (run_dir / "data.json").write_text(json.dumps({"tokens": "another"}))
    assert clean(root, "--max-bytes", "0", "--yes") == 0
    assert names(root) == []


def test_a_run_keeps_its_held_out_sets_too(root: Path, tmp_path: Path) -> None:
    for name in ("aa", "bb"):
        entry(root, name, days=99)
    run_dir = run_of(tmp_path, "bb")
    noted = {"tokens": "elsewhere", "eval_paths": {"code": {"tokens": "bb"}}}
    (run_dir / "data.json").write_text(json.dumps(noted))
    assert clean(root, "--max-bytes", "0", "--yes") == 0
    assert names(root) == ["bb"]


def test_runs_from_before_that_was_noted_keep_theirs_where_they_are_seen(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry(root, "aa", days=99)
    uses.file_of(path.parent, "aa").unlink()
    run_dir = tmp_path / "runs" / "older"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    (run_dir / "data.json").write_text(json.dumps({"tokens": "aa"}))
    monkeypatch.chdir(tmp_path)
    assert clean(root, "--max-bytes", "0", "--yes") == 0
    assert names(root) == ["aa"]


def test_looking_is_no_use(root: Path) -> None:
    """An entry from before uses were noted is as old as its files, however often it is listed."""
    path = entry(root, "aa")
    uses.file_of(path.parent, "aa").unlink()
    for file in (*path.iterdir(), path):
        os.utime(file, (1000, 1000))
    for _ in range(2):
        (found,) = look(root, [])
        assert (found.used_at, found.kept_for) == (1000, None)


def test_a_run_that_cannot_be_seen_from_here_keeps_its_tokens(root: Path, tmp_path: Path) -> None:
    entry(root, "aa")
    run_dir = run_of(tmp_path, "aa", host="another")
    (run_dir / "data.json").unlink()
    assert look(root, [])[0].kept_for is None  # its parent is here, and it is gone
    os.rename(run_dir.parent, tmp_path / "away")
    assert look(root, [])[0].kept_for == (
        f"{run_dir} on another may use it, and cannot be seen from here"
    )


def test_what_is_done_keeps_its_tokens_unless_that_is_given_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aa", "bb"):
        entry(root, name, days=99)
    done, _ = run_of(tmp_path, "aa"), run_of(tmp_path, "bb")
    monkeypatch.setattr(command, "_is_done", lambda run_dir: run_dir == done)
    assert clean(root, "--max-bytes", "0", "--yes") == 0
    assert names(root) == ["aa", "bb"]
    assert clean(root, "--max-bytes", "0", "--yes", "--done") == 0
    assert names(root) == ["bb"]


def test_of_a_run_that_cannot_be_read_nothing_is_known(tmp_path: Path) -> None:
    assert not command._is_done(tmp_path)
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    assert not command._is_done(tmp_path)


def test_a_process_keeps_what_it_has_open_until_it_ends(root: Path) -> None:
    """However it ends, and whatever its run has noted."""
    path = entry(root, "aa", days=99)
    program = (
        "import sys, pathlib; from shardwright.train.data.tokens.cache import take\n"
        f"take(pathlib.Path({str(path.parent)!r}), 'aa'); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (found,) = look(root, [])
        assert found.kept_for == OPEN
        assert time.time() - found.used_at < DAY
        assert remove(found, [], lambda _: True) == OPEN
        holder.kill()
    assert look(root, [])[0].kept_for is None


def test_a_preparation_holds_its_entries_and_notes_its_run(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    config = make_config()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    root = tmp_path / "cache"
    for trained_for in (OPEN, None):  # the second time the run has its tokenizer by itself
        prepare(config, run_dir)
        assert {f.path.parent.name: f.kept_for for f in look(root, [])} == {
            "tokens": OPEN,
            "tokenizers": trained_for,
        }
        (name,) = names(root)
        assert [u.run_dir for u in uses.users(root / "tokens", name)] == [run_dir]
        uses.release()
        assert {f.path.parent.name: f.kept_for for f in look(root, [])} == {
            "tokens": f"{run_dir} uses it",
            "tokenizers": None,
        }


def test_an_entry_that_is_removed_while_it_is_waited_for_is_built_again(root: Path) -> None:
    """Who waits for the lock gets it on a file that has no name any more."""
    path = entry(root, "aa")
    taken = []
    with uses.alone(path.parent, "aa") as is_alone:
        assert is_alone
        waiting = threading.Thread(target=lambda: taken.append(take(path.parent, "aa")))
        waiting.start()
        uses.file_of(path.parent, "aa").unlink()
        os.rename(path, path.with_name("away"))
    waiting.join()
    assert taken == [None]
    entry(root, "aa")
    assert find(path.parent, "aa") is not None
    assert take(path.parent, "aa") is not None
    assert {f.path.name: f.kept_for for f in look(root, [])}["aa"] == OPEN


def test_what_dead_builders_left_is_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = root / "tokens"
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    left = [
        f"aa.tmp-{here}-{dead.pid}",
        f"bb.tmp-removed-{here}-{dead.pid}",
        f"cc.tmp-another.host-{dead.pid}",
    ]
    kept = [
        f"dd.tmp-{here}-{os.getpid()}",
        f"ee.tmp-another.host-{dead.pid}",
        "ff.shards",
    ]
    for name in (*left, *kept):
        (tokens / name).mkdir(parents=True)
        (tokens / name / "train-0.uint16").write_bytes(bytes(10))
    for path in (tokens / left[2] / "train-0.uint16", tokens / left[2]):
        os.utime(path, (1000, 1000))
    assert clean(root, "--yes") == 0
    assert names(root) == kept
    said = capsys.readouterr().out
    assert said.count("(left over)") == 3
    assert "ee.tmp-another.host-" in said
    assert "(it was written less than a day ago by another.host)" in said
    assert "freed 30 B\n" in said


def test_nothing_that_is_being_built_is_removed(root: Path) -> None:
    tokens = root / "tokens"
    (tokens / "aa.tmp-another-1").mkdir(parents=True)
    os.utime(tokens / "aa.tmp-another-1", (1000, 1000))
    with filelock.FileLock(lock_of(tokens, "aa")):
        (found,) = look(root, [])
        assert found.kept_for == BUILDING
        assert remove(found, [], lambda _: True) == BUILDING
    assert look(root, [])[0].kept_for is None


def test_shards_of_a_preparation_that_was_stopped_go_by_their_age(root: Path) -> None:
    shards = root / "tokens" / "aa.shards"
    (shards / "000001").mkdir(parents=True)
    for path in (shards / "000001", shards):
        os.utime(path, (time.time() - 31 * DAY,) * 2)
    assert clean(root, "--yes") == 0
    assert names(root) == ["aa.shards"]
    assert clean(root, "--yes", "--older-than", "30d") == 0
    assert names(root) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", []), ("\n", ["aa"]), ("", ["aa"])])
def test_it_asks_on_a_terminal(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    left: list[str],
) -> None:
    entry(root, "aa", days=9)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert clean(root, "--older-than", "7d") == 0
    assert names(root) == left
    said = capsys.readouterr().out
    assert "remove it? [y/N] " in said
    assert ("nothing is removed\n" in said) == bool(left)


def test_it_refuses_where_there_is_nobody_to_ask(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry(root, "aa", days=9)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert clean(root, "--older-than", "7d") == 2
    assert capsys.readouterr().err == (
        "error: there is no terminal to ask on; add --yes to remove it, or --dry-run\n"
    )
    assert names(root) == ["aa"]
    assert clean(root, "--older-than", "10d") == 0  # nothing to ask about


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--older-than", "soon", "soon is not understood; say 30d, 12h or 45min for a time"),
        ("--older-than", "30", "30 is not understood"),
        ("--max-bytes", "many", "many is not understood"),
        ("--max-bytes", "-1GB", "-1GB is less than 0, or endless"),
    ],
)
def test_ages_and_sizes_are_understood_or_refused(
    root: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        clean(root, f"{flag}={value}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_somebody_elses_cache_is_read_and_nothing_is_noted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry(root, "aa")
    real = os.open

    def no_writing(name: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", no_writing)
    assert take(path.parent, "aa", path) is not None
    assert look(root, [])[0].kept_for == "it belongs to another user"
    monkeypatch.undo()
    assert look(root, [])[0].kept_for == OPEN
    assert list(uses.users(path.parent, "aa")) == []
