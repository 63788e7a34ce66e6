"""Data that a job array prepares: whatever happens to its tasks, the bytes are the same."""

from __future__ import annotations

import json
import random
import shlex
import sys
from pathlib import Path

import pytest

from shardwright.launchers.slurm import jobs as slurm
from tests.e2e import cli
from tests.slurm import runs
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import SLURM, shardwright

pytestmark = pytest.mark.slurm

# Stands in for Python in the jobs, and has them divide a corpus that no test could wait for.
PYTHON = """\
#!{python}
import runpy, sys
from shardwright.train.data.sources import shards
from shardwright.train.data.tokens import packing
shards.LEAST_BYTES = 100_000
packing.SIDE_BY_SIDE_FROM_CHARACTERS = 1
sys.argv = sys.argv[2:]
runpy.run_module("shardwright.train.data", run_name="__main__", alter_sys=True)
"""


def corpus_of(folder: Path, documents: int = 12_000) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 9))) for _ in range(3000)]
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        texts: list[str] = []
        for number in range(documents):
            is_again = number % 10 == 9  # as a document of another shard
            text = draw.choice(texts) if is_again else " ".join(draw.choices(words, k=200))
            texts.append(text)
            file.write(json.dumps({"text": text}) + "\n")
    return path


def tokens(cache: Path) -> dict[str, bytes]:
    (index,) = (cache / "tokens").glob("*/index.json")
    return {path.name: path.read_bytes() for path in index.parent.iterdir()}


@pytest.mark.parametrize("deduplicate", [False, True], ids=["all", "unique"])
def test_a_task_that_is_killed_and_one_that_is_preempted_change_nothing(
    deduplicate: bool, cluster: Cluster, tmp_path: Path
) -> None:
    corpus = corpus_of(tmp_path)
    of_both = f"data.deduplicate={str(deduplicate).lower()}"
    given = (*runs.overrides(corpus, tmp_path / "cache"), of_both)
    alone = (*runs.overrides(corpus, tmp_path / "alone"), of_both, "launcher=local")
    ended = cli.shardwright("prepare", *alone, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    python, site = tmp_path / "python", tmp_path / "site.sh"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    site.write_text(f"python={shlex.quote(str(python))}\n")
    ended = shardwright(
        cluster,
        *("prepare", *given, *SLURM, "launcher.array=2", "launcher.cpus_per_rank=4"),
        *(f"launcher.site={site}", "run_dir=prepared"),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    home = tmp_path / "prepared"
    job = str(slurm.job_of(home))

    def made() -> list[str]:
        found = (tmp_path / "cache" / "tokens").glob("*.shards/[0-9]*")
        return sorted(path.name for path in found if "tmp" not in path.name)

    def log() -> str:
        return runs.log(home)

    # Each task has a node: one crashes, the other is needed for something urgent.
    until(lambda: len(made()) >= 4, "some shards", 120, log, every=0.02)
    cluster.kill_node("node2")
    until(lambda: len(made()) >= 8, "more shards", 120, log, every=0.02)
    kept = set(made())
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodelist=node1", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    ).strip()
    cluster.wait_for_state(urgent, "COMPLETED", seconds=60)
    assert kept <= set(made())
    cluster.start_node("node2")
    cluster.wait_for_state(job, "COMPLETED", seconds=280)
    assert "start 2" in log(), log()
    assert tokens(tmp_path / "cache") == tokens(tmp_path / "alone")
    details = json.loads(tokens(tmp_path / "cache")["index.json"])["details"]
    assert details.get("duplicates") == (1_200 if deduplicate else None)
    assert not list((tmp_path / "cache" / "tokens").glob("*.shards"))


def test_srun_has_the_hosts_of_an_allocation_make_a_part_each(
    cluster: Cluster, tmp_path: Path
) -> None:
    """By one command within it, as ranks are started there."""
    corpus = corpus_of(tmp_path, documents=4_000)
    ended = cli.shardwright(
        *("prepare", *runs.overrides(corpus, tmp_path / "alone"), "launcher=local"), cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    packages, hosts = tmp_path / "packages", tmp_path / "hosts"
    packages.mkdir()
    (packages / "sitecustomize.py").write_text(
        "from shardwright.train.data.sources import shards\nshards.LEAST_BYTES = 100_000\n"
    )
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    allocation = ("salloc", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    ended = shardwright(
        cluster,
        *("prepare", *runs.overrides(corpus, tmp_path / "cache")),
        *("launcher=deepspeed", "launcher.backend=slurm", f"launcher.hostfile={hosts}"),
        *("launcher.backend_arguments='--cpus-per-task=2'", "run_dir=prepared"),
        cwd=tmp_path,
        within=(*allocation, "env", f"PYTHONPATH={cli.ROOT}:{packages}"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "each of 2 nodes makes a part" in ended.stderr
    assert tokens(tmp_path / "cache") == tokens(tmp_path / "alone")
    assert not (tmp_path / "prepared").exists()
