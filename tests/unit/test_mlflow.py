"""`tracking=mlflow`: one run over all resumes, whatever the server does, and no key in any file."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import from_tree
from shardwright.train.errors import UserError
from shardwright.train.loop.callbacks import tracking
from shardwright.train.tracking.mlflow import flattened
from tests.unit.trackers import (
    FIRST,
    RESUMED,
    expected,
    freeze,
    line,
    make_run_dir,
    of_mlflow,
    track,
    write,
)

run_dir = pytest.fixture(make_run_dir)
NOWHERE = "http://127.0.0.1:9"


def database(run_dir: Path) -> str:
    return f"sqlite:///{run_dir / 'mlflow' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database without a run, which MLflow takes long to make."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


def put(empty: Path, run_dir: Path) -> None:
    (run_dir / "mlflow").mkdir()
    shutil.copy(empty, run_dir / "mlflow")


def test_one_curve_over_a_resume_in_a_database_of_the_run(
    run_dir: Path, tiny_tree: Any, empty: Path
) -> None:
    tree = tiny_tree("clm")
    config = freeze(run_dir, tree, kind="mlflow", tags=["team=text"])
    put(empty, run_dir)
    write(run_dir, FIRST)
    (where,) = track(run_dir)
    assert where == f"mlflow ui --backend-store-uri '{database(run_dir)}'"
    (first,) = of_mlflow(database(run_dir))
    assert first.values == expected(FIRST, "time")
    assert first.times == {int(entry["time"] * 1000) for entry in FIRST}
    assert first.params == dict(flattened(config.model_dump(mode="json", by_alias=True)))
    assert first.tags["team"] == "text"
    assert first.status == "FINISHED"

    tree["trainer"]["max_steps"] = 9
    freeze(run_dir, tree, kind="mlflow", tags=["team=text"])
    write(run_dir, RESUMED)
    track(run_dir)
    (resumed,) = of_mlflow(database(run_dir))
    assert resumed.run_id == first.run_id
    assert resumed.values == expected(RESUMED, "time")
    assert resumed.times == {int(entry["time"] * 1000) for entry in RESUMED}
    assert resumed.params == first.params, "those of the first start, as MLflow has it"
    assert resumed.tags["resumed.trainer.max_steps"] == "9"


def test_a_server_that_cannot_be_reached_holds_up_nothing(
    run_dir: Path, tiny_tree: Any, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, with what to do later, and no key that was given is in any file."""
    keys = {"MLFLOW_TRACKING_PASSWORD": "a-secret-password", "MLFLOW_TRACKING_TOKEN": "a-token-too"}
    for name, value in {**keys, "MLFLOW_TRACKING_USERNAME": "somebody"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE.replace("//", "//me:in-the-address@"))
    config = freeze(run_dir, tiny_tree("clm"), kind="mlflow")
    console = io.StringIO()
    tracked = tracking.Tracking(config, run_dir, console)
    tracked.start()
    assert console.getvalue() == "", "it waits for nothing"
    write(run_dir, FIRST)
    tracked.close("done", seconds=100.0)  # of a loaded machine
    fails, lacks = console.getvalue().splitlines()
    assert fails.startswith("warning: MLflow fails (")
    assert fails.endswith("what is missing there is written once that is possible again")
    assert lacks.startswith("warning: MLflow lacks a part of this run (")
    assert f"sync '{run_dir}'" in lacks
    written = "".join(f.read_text(errors="replace") for f in run_dir.rglob("*") if f.is_file())
    for text in (*keys.values(), "in-the-address"):
        assert text not in written + console.getvalue()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copy(empty, run_dir / "mlflow")
    track(run_dir)
    assert of_mlflow(database(run_dir))[0].values == expected(FIRST, "time")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"uri": "https://me:my-password@host"},
            r"^tracking: uri=https://\*\*\*@host holds a password, which config.yaml would keep; "
            "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        ({"uri": "mlruns"}, "^tracking: uri=mlruns is a directory, to which MLflow writes no more"),
        ({"uri": "file:///a"}, "give http://HOST:PORT of a server or sqlite:///FILE"),
        ({"tags": ["text"]}, "^tracking: tags=text: a tag of MLflow is NAME=VALUE"),
    ],
)
def test_what_is_no_address_or_holds_a_key(
    tiny_tree: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_tree({**tiny_tree("clm"), "tracking": {"kind": "mlflow", **values}})
    assert "my-password" not in str(caught.value)


# --- a server of MLflow's own ---------------------------------------------------------------------

SERVER = """
import sys
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass
class Server:
    """The app that `mlflow server` serves, over a database that outlives it."""

    directory: Path
    port: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Start it, from the second time on at the same port."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)],
            cwd=self.directory,
            env=os.environ
            | {
                "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.directory / 'server.db'}",
                "_MLFLOW_SERVER_ARTIFACT_ROOT": str(self.directory / "artifacts"),
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for module in ("flask", "flask_cors"):
        pytest.importorskip(module, reason="what mlflow-skinny leaves out of its server")
    directory = tmp_path / "server"
    directory.mkdir()
    found = Server(directory)
    found.start()
    yield found
    if found.process.poll() is None:
        found.kill()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_gets_the_rest_later(
    run_dir: Path, tiny_tree: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = freeze(run_dir, tiny_tree("clm"), kind="mlflow", uri=server.uri)
    lines = [line(step, loss=1 / step) for step in range(1, 60)]
    write(run_dir, lines[:20])
    console = io.StringIO()
    tracked = tracking.Tracking(config, run_dir, console)
    tracked.start()
    deadline = time.monotonic() + 200
    while "mlflow: " not in console.getvalue() or len(of_mlflow(server.uri)[0].values) < 3:
        assert time.monotonic() < deadline, console.getvalue()
        tracked._hear()
        time.sleep(0.1)
    server.kill()
    write(run_dir, lines[:40])
    while "warning: MLflow fails (" not in console.getvalue():
        assert time.monotonic() < deadline, console.getvalue()
        tracked._hear()
        time.sleep(0.1)
    server.start()
    write(run_dir, lines)
    tracked.close("done", seconds=100.0)
    assert console.getvalue().count("warning") == 1, "told once, and nothing is missing"
    (run,) = of_mlflow(server.uri)
    assert (run.values, run.status) == (expected(lines, "time"), "FINISHED")


@pytest.mark.slow
def test_what_a_server_has_of_steps_that_are_trained_again_stays(
    run_dir: Path, tiny_tree: Any, server: Server
) -> None:
    freeze(run_dir, tiny_tree("clm"), kind="mlflow", uri=server.uri)
    write(run_dir, FIRST)
    track(run_dir)
    (first,) = of_mlflow(server.uri)
    write(run_dir, RESUMED)
    track(run_dir)
    (resumed,) = of_mlflow(server.uri)
    assert resumed.run_id == first.run_id
    values = expected(RESUMED, "time")
    for name, curve in first.values.items():
        values[name] |= curve
    assert resumed.values == values, "one curve, no gap, no step twice"
