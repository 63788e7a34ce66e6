"""What programs call in place of commands: `import shardwright`."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import shardwright
from shardwright.launchers import api, notebook, starting
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from tests.unit.launchers.ended_runs import make_ended_run
from tests.unit.launchers.run_directories import a_trained_run

TINY = (
    *("model=gpt2_tiny", "data=stdlib", "tracking=none", "launcher=local"),
    *("launcher.device=cpu", "trainer.max_steps=4"),
)


def test_the_import_is_light_and_all_names_are_there() -> None:
    code = (
        "import sys, shardwright\n"
        "assert not {'torch', 'hydra', 'pydantic'} & set(sys.modules), sys.modules.keys()\n"
        "assert callable(shardwright.train)\n"
        "import shardwright.train.errors as errors\n"
        "for name in shardwright.__all__: assert getattr(shardwright, name), name\n"
        "assert 'torch' not in sys.modules\n"
        "assert shardwright.UserError is errors.UserError\n"
        "assert shardwright.compose is shardwright.launchers.api.compose\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'shardwright' has no attribute 'nothing'"):
        shardwright.nothing  # noqa: B018


def test_a_config_is_that_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = api.compose(*TINY, "run_dir=runs/a", "trainer.learning_rate=1e-3")
    assert isinstance(config, RunConfig)
    assert config.run_dir == str(tmp_path / "runs/a")
    assert config.trainer.learning_rate == 1e-3
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("defaults: [gpt2_tiny]\nvocab_size: 300\n")
    config = api.compose(
        *TINY, "model=mine", "data.sequence_length=64", config_dir=tmp_path / "own"
    )
    assert config.model.vocabulary == 300


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_step=4"], "trainer.max_step"),
        (["-m", "seed=1,2"], "train and compose take one run"),
        (["seed=1,2"], "seed"),
    ],
)
def test_what_is_no_run_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        api.compose(*TINY, *overrides)


def test_a_config_is_trained_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RunConfig] = []

    def new_run(config: RunConfig, *_: Any, **options: Any) -> int:
        started.append(config)
        options["created"](Path(str(config.run_dir)))
        return codes.pop(0)

    monkeypatch.setattr(starting.launch, "new_run", new_run)
    codes = [0, 75, 1, 2]
    config = api.compose(*TINY, f"run_dir={tmp_path}/a")
    assert api.train(config).run_dir == tmp_path / "a"
    assert started == [config]
    assert api.train(*TINY, f"run_dir={tmp_path}/b").run_dir == tmp_path / "b"
    with pytest.raises(api.RunFailed, match="has ended with exit code 1") as failed:
        api.train(*TINY, f"run_dir={tmp_path}/c")
    assert (failed.value.run_dir, failed.value.exit_code) == (tmp_path / "c", 1)
    with pytest.raises(UserError, match="a rank has refused its config"):
        api.train(*TINY, f"run_dir={tmp_path}/d")
    assert len(started) == 4
    with pytest.raises(UserError, match="a config is whole: give it alone"):
        api.train(config, "seed=2")
    assert api.train(config, check_only=True).run_dir == tmp_path / "a"
    assert len(started) == 4


def test_a_run_is_read(tmp_path: Path) -> None:
    run_dir = a_trained_run(tmp_path / "run", [5.0, 4.0, 3.0])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as it is being written
    run = api.load_run(run_dir)
    assert [line["loss"] for line in run.metrics if "loss" in line] == [5.0, 4.0, 3.0]
    assert api.read_metrics(run_dir) == run.metrics
    assert run.config.trainer.max_steps == 3
    assert run.status.state == "done"
    assert run.checkpoints == []
    assert run.final == run_dir / "final"
    assert api.read_metrics(tmp_path) == []
    with pytest.raises(UserError, match="is not a run directory"):
        api.load_run(tmp_path)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = api.load_run(make_ended_run(tmp_path))
    assert [path.name for path in run.checkpoints] == ["checkpoint-60"]
    with pytest.raises(UserError, match=r"has no final/ yet .*; resume it, or recover"):
        run.model()


def test_a_resume_is_that_of_the_command(tmp_path: Path) -> None:
    run_dir = make_ended_run(tmp_path)
    with pytest.raises(UserError, match=r"seed=2 was \d+, and a resumed run keeps it"):
        api.resume(run_dir, "seed=2")
    with pytest.raises(UserError, match="has no checkpoint of step 7; choose one of 60"):
        api.resume(run_dir, step=7)


def test_what_recover_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recover has no option type; there are .*dtype"):
        api.recover(tmp_path, tmp_path / "out", type="bf16")


def test_ranks_are_started_from_the_main_thread(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def call() -> None:
        try:
            api.train(*TINY)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    (error,) = raised
    assert "is started from the main thread alone" in str(error)


# --- in a notebook --------------------------------------------------------------------------------


def test_a_cell_shows_a_runs_line_and_curve(tmp_path: Path) -> None:
    run_dir = a_trained_run(tmp_path / "run", [5.0, 4.0, 3.0, 2.5])
    shown = notebook.picture(run_dir, None, ended=["<the end>"])
    assert f"<pre>{run_dir}  done" in shown
    assert "<svg" in shown
    assert "&lt;the end&gt;" in shown
    assert notebook.live_line(tmp_path / "none") == f"{tmp_path}/none  starting"
    assert "<svg" not in notebook.picture(tmp_path / "none", None)


def test_a_cell_starts_ranks_of_this_machine_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="launcher=torchrun starts ranks elsewhere, and notebook_l"):
        notebook.notebook_launch(
            *TINY,
            "launcher=torchrun",
            "launcher.nodes=2",
            "launcher.head_address=a",
            "launcher.nproc_per_node=1",
        )


def test_what_a_run_refuses_is_raised_in_the_cell(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"^run_dir=.*taken exists"):
        notebook.notebook_launch(*TINY, f"run_dir={tmp_path}/taken")


def test_a_notebook_needs_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="notebook_launch needs the package ipython"):
        notebook.notebook_launch(*TINY)
