"""The section "tracking": where metrics go besides metrics.jsonl."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwright.train.config.section import Section, Strings
from shardwright.train.paths import absolute


class TrackingSection(Section):
    """What every tracker has; a kind overrides what is different with it."""

    has_offline: ClassVar[bool] = False
    """It writes a run down here where its server does not answer."""

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        """Return the modules that its process imports, each with what pip calls it. Pure."""
        return {}

    def problems(self, environment: Mapping[str, str], *, has_key: bool) -> list[str]:
        """Return a message for each thing that keeps it from what is asked for. Pure.

        ``has_key`` says whether this machine has a key of W&B's.
        """
        return []

    def settled(self, mode: str | None, *, has_key: bool) -> Self:
        """Return the section with what is open, or relative, replaced by what it comes to here.

        ``mode`` is the one that the environment asks W&B for.
        """
        return self

    def in_mode(self, mode: str) -> Self:
        """Return the section in a mode that the environment asks W&B for. Pure."""
        return self

    def in_words(
        self, name: str, environment: Mapping[str, str], mode: str | None, *, has_key: bool
    ) -> str:
        """Return what a run's header says of it; ``name`` is the run's. Pure."""
        return str(self.kind)  # type: ignore[attr-defined]


class NoTracking(TrackingSection):
    """Only metrics.jsonl."""

    kind: Literal["none"]


class TensorboardTracking(TrackingSection):
    """TensorBoard event files under the run directory."""

    kind: Literal["tensorboard"]

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        return {"tensorboard": "tensorboard"}


class WandbTracking(TrackingSection):
    """Weights & Biases."""

    has_offline: ClassVar[bool] = True

    kind: Literal["wandb"]
    project: str | None = None
    """null is WANDB_PROJECT, or else shardwright."""
    entity: str | None = None
    """null is WANDB_ENTITY, or else the key's own."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is WANDB_MODE, or else online where an API key is found and offline where there is none;
    the run's first lines say which."""
    tags: Strings = ()
    """None are WANDB_TAGS."""

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        return {"wandb": "wandb"}

    def problems(self, environment: Mapping[str, str], *, has_key: bool) -> list[str]:
        if problems := wandb_problems(self, environment):
            return problems
        if self.mode == "online" and not has_key:
            return [
                "tracking.mode=online, but there is no API key; run `wandb login`, set "
                "WANDB_API_KEY, or choose tracking.mode=offline"
            ]
        return []

    def settled(self, mode: str | None, *, has_key: bool) -> Self:
        if self.mode != "auto":
            return self
        return self.in_mode(mode or ("online" if has_key else "offline"))

    def in_mode(self, mode: str) -> Self:
        return self.model_copy(update={"mode": mode})

    def in_words(
        self, name: str, environment: Mapping[str, str], mode: str | None, *, has_key: bool
    ) -> str:
        how: str = self.mode
        if mode is not None:
            how += ", as the environment says"
        elif self.mode == "offline" and not has_key:
            how += ": no API key found"
        unused = wandb_unused(name, self, environment)
        return f"wandb ({how})" + (
            f"; {', '.join(unused)} is overridden by the config" if unused else ""
        )


class MlflowTracking(TrackingSection):
    """MLflow: a server, or a database under the run directory."""

    kind: Literal["mlflow"]
    uri: str | None = None
    """http(s)://HOST:PORT of a server, or sqlite:///FILE and other databases; null is
    MLFLOW_TRACKING_URI, or else a database under the run directory. Keys belong into the
    environment alone: MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN."""
    experiment: str | None = None
    """null is MLFLOW_EXPERIMENT_NAME, or else shardwright."""
    tags: Strings = ()
    """Of the run, each as NAME=VALUE."""

    @model_validator(mode="after")
    def _is_an_address_without_keys(self) -> Self:
        if self.uri is not None and (problem := mlflow_uri_problem(self.uri)):
            raise ValueError(f"uri={without_password(self.uri)} {problem}")
        if self.uri is not None and without_password(self.uri) != self.uri:
            raise ValueError(
                f"uri={without_password(self.uri)} holds a password, which config.yaml would keep; "
                "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "give the whole address by MLFLOW_TRACKING_URI"
            )
        if odd := [tag for tag in self.tags if not re.match(r"[^=\s][^=]*=", tag)]:
            raise ValueError(f"tags={odd[0]}: a tag of MLflow is NAME=VALUE, such as team=text")
        return self

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        needed = {"mlflow": "mlflow-skinny"}
        uri = self.address(environment)
        if uri is None or not uri.startswith(_SERVERS):
            needed |= {"sqlalchemy": "sqlalchemy", "alembic": "alembic"}
        return needed

    def problems(self, environment: Mapping[str, str], *, has_key: bool) -> list[str]:
        uri = self.address(environment)
        if self.uri is not None or uri is None or environment.get("MLFLOW_ALLOW_FILE_STORE"):
            return []
        problem = mlflow_uri_problem(uri)
        return [f"MLFLOW_TRACKING_URI={without_password(uri)} {problem}"] if problem else []

    def settled(self, mode: str | None, *, has_key: bool) -> Self:
        if self.uri is None or not self.uri.startswith("sqlite:///"):
            return self
        path = absolute(self.uri.removeprefix("sqlite:///"))
        return self.model_copy(update={"uri": f"sqlite:///{path}"})

    def address(self, environment: Mapping[str, str]) -> str | None:
        """Return where it writes to; None is the run's own database. Pure."""
        return self.uri or environment.get("MLFLOW_TRACKING_URI") or None

    def in_words(
        self, name: str, environment: Mapping[str, str], mode: str | None, *, has_key: bool
    ) -> str:
        uri = self.address(environment)
        if uri is None:
            return "mlflow (in the run directory)"
        by = "" if self.uri else ", by MLFLOW_TRACKING_URI"
        return f"mlflow ({without_password(uri)}{by})"


class TrackioTracking(TrackingSection):
    """Trackio: a database of this machine, which `trackio show` draws."""

    kind: Literal["trackio"]
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "shardwright"
    """Letters, digits, _ and - alone: it names the database."""
    directory: str | None = None
    """Where the database lies, which several runs may share; null is TRACKIO_DIR, or else trackio/
    in the run directory."""

    def packages(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        return {"trackio": "trackio"}

    def settled(self, mode: str | None, *, has_key: bool) -> Self:
        directory = self.directory and absolute(self.directory)
        return self.model_copy(update={"directory": directory})

    def in_words(
        self, name: str, environment: Mapping[str, str], mode: str | None, *, has_key: bool
    ) -> str:
        where = self.directory or environment.get("TRACKIO_DIR") or "in the run directory"
        remote = [v for v in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if environment.get(v)]
        unused = f"; {' and '.join(remote)} is not used: later by `trackio sync`" if remote else ""
        return f"trackio ({where}){unused}"


TrackingConfig = Annotated[
    NoTracking | TensorboardTracking | WandbTracking | MlflowTracking | TrackioTracking,
    Field(discriminator="kind"),
]


# --- where MLflow is ------------------------------------------------------------------------------

_SERVERS = ("http://", "https://", "databricks", "uc")


def mlflow_uri_problem(uri: str) -> str | None:
    """Return what is wrong with an address of MLflow's; None where nothing is. Pure."""
    if uri.startswith(_SERVERS):
        return None
    if uri.startswith("file:") or "://" not in uri:
        # mlflow 3.17, store/tracking/file_store.py: it raises, as files get no updates any more.
        return (
            "is a directory, to which MLflow writes no more; give http://HOST:PORT of a server or "
            "sqlite:///FILE, or leave it out for a database under the run directory"
        )
    return None


def without_password(uri: str) -> str:
    """Return an address with *** where it has a user's password. Pure."""
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://***@", uri)


# --- what the environment says of W&B -------------------------------------------------------------

_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_CAUTION = ("online", "offline", "disabled")


def wandb_mode(environment: Mapping[str, str]) -> str | None:
    """Return the mode that WANDB_DISABLED or WANDB_MODE ask for, None where neither does. Pure.

    A word that W&B does not know asks for nothing; `wandb_problems` names it.
    """
    if environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return _MODES.get(environment.get("WANDB_MODE", "").lower())


def most_cautious_mode(configured: str, by_environment: str | None) -> str:
    """Return which of both a rank takes: that which reaches for less, as on a node without a
    network. Pure."""
    return max(configured, by_environment or configured, key=_CAUTION.index)


def wandb_project(tracking: WandbTracking, environment: Mapping[str, str]) -> str:
    return tracking.project or environment.get("WANDB_PROJECT") or "shardwright"


def wandb_name(name: str, environment: Mapping[str, str]) -> str:
    """Return the name of the run: a config that has chosen none leaves it to WANDB_NAME. Pure."""
    return environment.get("WANDB_NAME", name) if name == "run" else name


def wandb_problems(tracking: WandbTracking, environment: Mapping[str, str]) -> list[str]:
    """Return a message where the environment contradicts the config. Pure."""
    said = environment.get("WANDB_MODE", "")
    if said and said.lower() not in _MODES:
        return [f"WANDB_MODE={said} is not known; use online, offline or disabled, or unset it"]
    mode = wandb_mode(environment)
    if mode is not None and tracking.mode not in ("auto", mode):
        name = "WANDB_DISABLED" if environment.get("WANDB_DISABLED") else "WANDB_MODE"
        return [
            f"tracking.mode={tracking.mode}, but {name}={environment[name]} requests {mode}; "
            f"unset {name}, or set tracking.mode={mode}"
        ]
    return []


def wandb_unused(name: str, tracking: WandbTracking, environment: Mapping[str, str]) -> list[str]:
    """Return the variables of the environment that the config's own words replace. Pure."""
    used = {
        "WANDB_PROJECT": wandb_project(tracking, environment),
        "WANDB_NAME": wandb_name(name, environment),
        "WANDB_ENTITY": tracking.entity,
        "WANDB_TAGS": ",".join(tracking.tags) or None,
    }
    return [
        f"{variable}={environment[variable]}"
        for variable, value in used.items()
        if value is not None and environment.get(variable, value) != value
    ]
