"""`tracking=mlflow`: a server of MLflow's, or a database under the run directory."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardwright.train.config.tracking import MlflowTracking, without_password
from shardwright.train.run_directory.names import METRICS, MLFLOW_FOLDER
from shardwright.train.tracking.lines import Line, Missing, Point, Tail, points
from shardwright.train.tracking.tracker import Target, Tracker

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

TAG = "shardwright.run"
"""Of a run of MLflow's: which run directory's it is. MLflow chooses its id itself."""
DEFAULTS = {
    # A service that does not answer is tried again by the handover, not for minutes within a call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STATUS = {"done": "FINISHED", "stopped": "KILLED"}
"""By how a run has ended; FAILED else."""
# What its validation takes at most (mlflow 3.17, utils/validation.py).
METRICS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
LONGEST_PARAMETER = 6000


class Mlflow(Tracker[MlflowTracking]):
    name = "MLflow"

    def open(self) -> Target:
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow.tracking import MlflowClient

        run_id = self.run_id(MLFLOW_FOLDER)
        uri, artifacts = self.section.address(os.environ), None
        if uri is None:
            folder = self.run_dir / MLFLOW_FOLDER
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(client, artifacts)
        run = self._run(client, experiment, run_id)
        if uri.startswith("http"):
            where = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run.info.run_id}"
            self.say(f"mlflow: {without_password(where)}")
        else:
            self.say(f"mlflow ui --backend-store-uri {shlex.quote(without_password(uri))}")
        lines = Tail(self.run_dir / METRICS).lines()
        return _Curves(client, run.info.run_id, there(client, run, lines))

    def _experiment(self, client: MlflowClient, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = self.section.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "shardwright"
        if (found := client.get_experiment_by_name(name)) is None:
            try:
                return client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another run has made it meanwhile
                if (found := client.get_experiment_by_name(name)) is None:
                    raise
        return found.experiment_id

    def _run(self, client: MlflowClient, experiment: str, run_id: str) -> Run:
        """Return the run that belongs to this directory, which says what its config says now."""
        tags = {TAG: run_id, "shardwright.run_dir": str(self.run_dir)}
        tags |= {name: value for name, _, value in (t.partition("=") for t in self.section.tags)}
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
        run = (
            found[0]
            if found
            else client.create_run(experiment, run_name=self.config.name, tags=tags)
        )
        client.update_run(run.info.run_id, status="RUNNING")
        wanted = dict(flattened(self.config.model_dump(mode="json", by_alias=True)))
        _describe(client, run, wanted, tags)
        return run


def _describe(
    client: MlflowClient, run: Run, parameters: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Set a run's parameters and tags; what a resume has changed is a tag, as they are for good."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    changed = {f"resumed.{k}": v for k, v in parameters.items() if known.get(k, v) != v}
    new = [Param(key, value) for key, value in parameters.items() if key not in known]
    for at in range(0, len(new), PARAMETERS_PER_BATCH):
        client.log_batch(run.info.run_id, params=new[at : at + PARAMETERS_PER_BATCH])
    told = [RunTag(key, value) for key, value in {**tags, **changed}.items()]
    for at in range(0, len(told), PARAMETERS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=told[at : at + PARAMETERS_PER_BATCH])


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a config's values by dotted keys, as MLflow's parameters. Pure."""
    for key, value in tree.items():
        name = prefix + re.sub(r"[^\w. :/-]", "_", str(key))
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield name, text[:LONGEST_PARAMETER]


def there(client: MlflowClient, run: Run, lines: Iterable[Line]) -> list[Point]:
    """Return which points a run has; what metrics.jsonl has otherwise is removed, if it can be.

    A database forgets the curves then, to get them anew. A server has no request for that: there,
    steps that are trained again stay as they were first recorded.
    """
    run_id = run.info.run_id
    found = {
        (name, point.step): (point.value, point.timestamp)
        for name in run.data.metrics
        for point in client.get_metric_history(run_id, name)
    }
    wanted = {key: (value, _milliseconds(time)) for key, (value, time) in points(lines).items()}
    if any(wanted.get(key) != point for key, point in found.items()) and _forgets(client, run_id):
        return []
    return list(found)


def _forgets(client: MlflowClient, run_id: str) -> bool:
    """Remove a run's curves; return False where they are not in a database of this process's."""
    # mlflow 3.17 deletes runs, but no metrics of one, and chooses the id of each run itself.
    store = client._tracking_client.store
    if not hasattr(store, "ManagedSessionMaker"):
        return False
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric

    with store.ManagedSessionMaker() as session:
        for table in (SqlMetric, SqlLatestMetric):
            session.query(table).filter_by(run_uuid=run_id).delete()
    return True


class _Curves:
    """The metrics of one run of MLflow's."""

    def __init__(self, client: MlflowClient, run_id: str, found: list[Point]) -> None:
        self._client, self._run_id = client, run_id
        self._missing = Missing(found)
        self._waiting: list[Metric] = []

    def write(self, line: Line) -> None:
        from mlflow.entities import Metric

        time, step = _milliseconds(line["time"]), line["step"]
        new = self._missing.of(line).items()
        self._waiting += [Metric(name, value, time, step) for name, value in new]

    def caught_up(self) -> None:
        while self._waiting:
            self._client.log_batch(self._run_id, metrics=self._waiting[:METRICS_PER_BATCH])
            del self._waiting[:METRICS_PER_BATCH]

    def finish(self, outcome: str) -> None:
        self._client.set_terminated(self._run_id, STATUS.get(outcome, "FAILED"))

    def discard(self) -> None:
        pass  # the next one asks what has come


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
