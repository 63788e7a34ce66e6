"""`shardwright prepare` with a hostfile: what each host is told, and what comes of what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.hosts import preparing, remote
from shardwright.launchers.hosts.remote import Ended, Printed, Remote, heard, script
from shardwright.launchers.kinds import deepspeed
from shardwright.train.console.reports import MARK, Far, Said
from shardwright.train.data.sources import shards
from shardwright.train.errors import BAD_INPUT, FAILED
from tests.e2e.cli import TINY
from tests.unit.launchers.configs import resolved
from tests.unit.launchers.fakes import Shardwright, make_shardwright

TEXT = "The light dove, cleaving the air in her free flight, and feeling its resistance. "


@pytest.fixture
def shardwright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shardwright:
    """The command line, whose hosts are all this machine, but for those that are not reached."""

    def on_host(self: deepspeed.Deepspeed, host: str, script: str) -> list[str]:
        return ["sh", "-c", f"echo no route to {host} >&2; exit 255" if host == "far" else script]

    monkeypatch.setattr(deepspeed.Deepspeed, "on_host", on_host)
    return make_shardwright(tmp_path, monkeypatch, capfd)


def overrides(folder: Path, hosts: Sequence[str]) -> list[str]:
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    (folder / "corpus").mkdir()
    for i in range(20):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i} {TEXT}" * 20)
    return [
        *("model=gpt2_tiny", "objective=clm", *TINY, "data=text", "data.paths=[corpus]"),
        *("data.sequence_length=32", "data.cache_dir=cache", "run_dir=prepared"),
        "data.eval_fraction=0",
        *("trainer.global_batch_size=8", "trainer.micro_batch_size=2"),
        *("launcher=deepspeed", "launcher.hostfile=hosts"),
    ]


def test_a_corpus_that_is_not_divided_is_prepared_by_the_first_host(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    ended = shardwright("prepare", *overrides(tmp_path, ["node1", "far"]))
    assert ended.code == 0, ended.err
    assert "prepared: the corpus is not divided, and node1 prepares all of it\n" in ended.err
    assert ended.out.startswith(f"  tokens      {tmp_path}/cache/tokens/")
    assert {path.name for path in tmp_path.iterdir()} == {"hosts", "corpus", "cache"}
    assert not list((tmp_path / "cache").glob(".shared-*"))


def test_what_is_wrong_with_the_corpus_is_said_by_the_host_that_finds_it(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    given = overrides(tmp_path, ["node1", "far"])
    (tmp_path / "quality.py").write_text("def keep(text):\n    raise ValueError(text[:2])\n")
    ended = shardwright("prepare", *given, "data.filter=quality.py:keep")
    assert ended.code == BAD_INPUT, ended
    assert re.search(r"node1: error: data\.filter=.*keep failed at the document", ended.err)
    assert "error: node1 has failed with exit code 2; what it said is above" in ended.err
    assert not (tmp_path / "prepared").exists()


def test_a_host_that_is_not_reached_stops_the_others(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LEAST_BYTES", 2000)
    ended = shardwright("prepare", *overrides(tmp_path, ["node1", "far"]))
    assert ended.code == FAILED, ended
    assert (
        "error: far was not reached (no route to far); see that `ssh far true` works without a "
        "password, or leave it out by launcher.exclude=far"
    ) in ended.err
    assert "error: node1" not in ended.err
    assert "preparing the data failed: a tokenizer that is whole is kept" in ended.err


def test_hosts_have_to_share_run_and_cache(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = overrides(tmp_path, ["node1"])
    real = preparing.command
    lost = {"run_dir": tmp_path / "prepared", "data.cache_dir": tmp_path / "cache"}
    for name, directory in lost.items():

        def command(*arguments: object, lost: Path = directory) -> list[str]:
            *shell, what = real(*arguments)  # type: ignore[arg-type]
            return [*shell, what.replace(str(lost), f"{lost}/elsewhere")]

        monkeypatch.setattr(preparing, "command", command)
        ended = shardwright("prepare", *given)
        assert ended.code == BAD_INPUT
        assert f"{name}={directory}/elsewhere on " in ended.err
        assert (
            "is not that of the node where this was started; give a directory that all nodes of "
            "launcher.hostfile share"
        ) in ended.err


def test_a_dry_run_shows_what_each_host_would_be_told(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LEAST_BYTES", 20_000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    ended = shardwright(
        "prepare", "--dry-run", *overrides(tmp_path, ["node1", "node2", "node3", "node4"])
    )
    assert ended.code == 0, ended.err
    commands = ended.out.split("# commands\n")[1].splitlines()
    assert [re.findall(r"--part=\d/\d", line) for line in commands] == [
        ["--part=0/2"],
        ["--part=1/2"],
        [],
    ], "as many as there are shards"
    assert all(f"cd {tmp_path} || exit 1; exec env " in line for line in commands)
    assert all("HF_HUB_OFFLINE=1" in line and "secret" not in line for line in commands)
    assert not (tmp_path / "cache").exists()


# --- the remote shell -----------------------------------------------------------------------------


def of_hosts(hosts: Path, **settings: Any) -> deepspeed.Deepspeed:
    hosts.write_text("a slots=1\nb slots=1\nc slots=1\nd slots=1\n")
    config = resolved("deepspeed", hostfile=str(hosts), **settings)
    return deepspeed.Deepspeed(config, config.launcher)  # type: ignore[arg-type]


def test_ssh_reaches_the_chosen_hosts(tmp_path: Path) -> None:
    launcher = of_hosts(tmp_path / "hosts", include="a@c", ssh_port=2222)
    assert launcher.hosts() == ["a", "c"]
    argv = launcher.on_host("a", "echo 'it is'")
    assert argv[:2] == ["ssh", "-T"]
    assert argv[-5:] == ["-p", "2222", "--", "a", "exec sh -c 'echo '\"'\"'it is'\"'\"''"]
    assert "BatchMode=yes" in argv, "nobody can be asked for a password"
    assert resolved("deepspeed").launcher.kind == "deepspeed"
    config = resolved("deepspeed")
    assert deepspeed.Deepspeed(config, config.launcher).hosts() == ()  # type: ignore[arg-type]


def test_srun_reaches_them_within_an_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = of_hosts(tmp_path / "hosts", backend="slurm", backend_arguments="-c 8")
    assert launcher.on_host("b", "true") == [
        *("srun", "--nodes=1", "--ntasks=1", "--nodelist=b", "--overlap", "-c", "8"),
        *("sh", "-c", "true"),
    ]
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    (problem,) = launcher.problems_with_hosts()
    assert problem.startswith("launcher.backend=slurm starts ranks with srun inside an allocation")


def test_what_reaches_them_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = of_hosts(tmp_path / "hosts")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert list(launcher.problems_with_hosts()) == [
        f"launcher.hostfile={tmp_path}/hosts: ssh reaches its hosts, and is not installed; install "
        "it, or leave the hostfile out"
    ]


def test_a_script_means_the_same_through_a_shell(tmp_path: Path) -> None:
    hostile = tmp_path / "a b $(touch ran) 'q'"
    hostile.mkdir()
    text = script(["sh", "-c", 'pwd; echo "$A|$1"', "-", "c '$(touch ran)"], hostile, {"A": "x 'y"})
    ended = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{hostile}\nx 'y|c '$(touch ran)\n"
    assert not list(tmp_path.rglob("ran"))


def test_what_a_command_tells_is_heard_to_its_last_line() -> None:
    far = Far("tokenising", "B", 10.0, 2.0, 1.0, {"documents": 3}, is_over=False)
    argv = ["sh", "-c", 'printf "%s\\nplain\\n\\n" "$1"; printf "no end" >&2; exit 3', "-"]
    told = Remote("a", [*argv, f"{MARK}{json.dumps(list(far))}"])
    other = Remote(
        "b", ["sh", "-c", 'echo "$1"; read line; echo "$line"; sleep 60 &', "-", MARK + '["x"]']
    )
    other.stop("a person")
    all_of_it: dict[str, list[remote.Told]] = {"a": [], "b": []}
    for one, each in heard([told, other]):
        all_of_it[one.host].append(each)
    assert far in all_of_it["a"]
    assert Printed("plain") in all_of_it["a"]
    assert all_of_it["a"][-2:] == [Printed("no end"), Ended(3)]
    assert len(all_of_it["a"]) == 4
    assert all_of_it["b"] == [Said("x"), Printed("stop a person"), Ended(0)], "a child holds on"
    assert (told.is_heard_of, list(told.last_lines)) == (True, ["plain", "no end"])
    told.close()
    other.close()


# --- what is made of it ---------------------------------------------------------------------------


def test_nodes_are_shown_as_one() -> None:
    far: dict[str, Far] = {}
    first = Far("training the tokenizer", "", None, 0, 0, {}, is_over=False)
    assert preparing.together(far, "a", first, 100) == first
    one = Far("tokenising", "B", 60.0, 30.0, 10.0, {"documents": 3, "tokens": 9}, is_over=True)
    other = Far("tokenising", "B", 40.0, 5.0, 0.0, {"documents": 1}, is_over=False)
    preparing.together(far, "a", one, 100)
    counts = {"documents": 4, "tokens": 9}
    assert preparing.together(far, "b", other, 100) == Far(
        "tokenising", "B", 100, 35.0, 10.0, counts, is_over=False
    )
    late = Far("reading", "", None, 0, 0, {}, is_over=False)
    assert preparing.together(far, "b", late, 100).done == 35.0
    assert preparing.together(far, "b", late, None) == late


@pytest.mark.parametrize(
    ("code", "was_reached", "makes_sense"),
    [(255, False, False), (2, True, False), (255, True, True), (1, True, True)],
)
def test_when_the_others_go_on(code: int, was_reached: bool, makes_sense: bool) -> None:
    assert preparing.makes_sense_without(code, was_reached) == makes_sense


@pytest.mark.parametrize(
    ("code", "was_reached", "message"),
    [
        (
            127,
            False,
            r"a could not start its part, exit code 127 \(last\); all nodes need .*python",
        ),
        (255, True, r"a was lost, or its process killed \(last\)"),
        (75, True, "a was told to stop by somebody else"),
        (1, True, "a has failed with exit code 1; what it said is above"),
    ],
)
def test_how_a_node_has_failed(code: int, was_reached: bool, message: str) -> None:
    told = Remote("a", ["true"])
    told.is_heard_of = was_reached
    told.last_lines.append("error: last")
    assert re.match(message, preparing.why(told, code))
    told.close()
