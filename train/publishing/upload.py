"""A commit to a repository on a hub: who may, where to, and what is said where it fails."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardwright.train.errors import UserError
from shardwright.train.publishing.contents import README

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NO_TOKEN = "no token was found: run `hf auth login`, or set HF_TOKEN, to one with write access"


@dataclass(frozen=True)
class Target:
    """Where a commit goes."""

    repo: str
    """NAME of whoever the token belongs to, or OWNER/NAME."""
    message: str
    public: bool = False
    revision: str | None = None
    """A branch, made where it is missing."""
    tags: tuple[str, ...] = ()
    key: str = "REPO"
    """What the user has named the repository by."""
    ways: tuple[str, str] = ("leave --public out", "add --public")
    """How the user asks for a private and for a public one."""


class Pushed(NamedTuple):
    """What a commit has come to."""

    repo: str
    url: str
    commit: str


def check_repo_name(repo: str, key: str = "REPO") -> None:
    """Raise UserError for a name that a hub does not take."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        text = str(error).partition(" Use `repo_type`")[0]
        raise UserError(f"{key}={repo} is not a valid name on a hub: {text}") from None


def is_weights(name: str) -> bool:
    """Whether a file of a repository would be loaded as a model's weights. Pure."""
    return re.fullmatch(r"[^/]+\.(safetensors|safetensors\.index\.json|bin)", name) is not None


def upload(
    target: Target,
    files: Mapping[str, Path],
    is_stale: Callable[[str], bool] = is_weights,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Upload files in one commit, which deletes those that are stale and not among them.

    Raises UserError where the token may not, and else what the hub's library raises. What stays of
    an older model could be loaded in place of this one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    warnings.filterwarnings("ignore", "Warnings while validating metadata")
    if get_token() is None:
        raise UserError(NO_TOKEN)
    api = HfApi()
    me = _who(api)
    repo = target.repo if "/" in target.repo else f"{me['name']}/{target.repo}"
    _check_namespace(repo, me, target)
    created = _ensure(api, repo, target)
    if target.revision not in (None, "main"):
        api.create_branch(repo, branch=str(target.revision), exist_ok=True)
    if not created:
        _check_tags(api, repo, target.tags)
    there = [] if created else api.list_repo_files(repo, revision=target.revision)
    stale = [name for name in there if name not in files and is_stale(name)]
    for name in stale:
        say(f"  deletes   {name}: weights of an older model")
    contents: dict[str, Path | bytes] = dict(files)
    if README in files:
        contents[README] = _card(files[README], repo)
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
        ],
        commit_message=target.message,
        revision=target.revision,
    )
    for tag in target.tags:
        api.create_tag(repo, tag=tag, revision=commit.oid)
    return Pushed(repo, f"{api.endpoint}/{repo}", commit.oid)


def _card(path: Path, repo: str) -> bytes:
    """Return a card with the name that its model has on the hub."""
    from shardwright.train.export.card_text import MODEL_PLACEHOLDER

    return path.read_text(encoding="utf-8").replace(MODEL_PLACEHOLDER, repo).encode()


def _check_tags(api: HfApi, repo: str, tags: Sequence[str]) -> None:
    """Raise UserError where a tag is taken, before anything is sent: tags do not move."""
    taken = {each.name for each in api.list_repo_refs(repo).tags} if tags else set()
    if found := sorted(taken.intersection(tags)):
        raise UserError(
            f"{repo} has a tag {found[0]} already, which stays with what it names; choose another "
            f"--tag, or delete it at {api.endpoint}/{repo}/tree/{found[0]}"
        )


def _who(api: HfApi) -> dict[str, Any]:
    """Return the hub's account of who pushes. Raises UserError where it does not take the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.whoami()
    except HfHubHTTPError as error:
        if status_of(error) == 401:
            raise UserError(
                f"{api.endpoint} does not accept the token: it is invalid or has expired; run "
                "`hf auth login`, or set HF_TOKEN, to a valid one"
            ) from None
        raise


def _check_namespace(repo: str, me: dict[str, Any], target: Target) -> None:
    """Raise UserError where a repository lies with none of whom the pusher can be."""
    owners = [str(me["name"]), *(str(org["name"]) for org in me.get("orgs", []) if "name" in org)]
    owner, name = repo.split("/")
    if owner not in owners:
        raise UserError(
            f"{target.key}={repo} belongs to {owner}, and this token belongs to {me['name']}"
            + (f", a member of {', '.join(owners[1:])}" if owners[1:] else "")
            + f"; push to {me['name']}/{name}, or use a token of {owner}"
        )


def _ensure(api: HfApi, repo: str, target: Target) -> bool:
    """Make the repository where it is missing; return whether it was.

    Raises UserError where it is there in the other visibility, or may not be made.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    public = target.public
    try:
        is_private = bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        try:
            api.create_repo(repo, private=not public)
        except HfHubHTTPError as error:
            if status_of(error) in (401, 403):
                raise UserError(may_not_write(repo)) from None
            raise
        return True
    if is_private == public:
        have, want = ("private", "public") if is_private else ("public", "private")
        to_private, to_public = target.ways
        way = f"{to_private} to push to a {have} model" if public else to_public
        raise UserError(
            f"{repo} exists and is {have}, but {want} was requested; a push does not change "
            f"that: {way}, choose another name, or make it {want} in its settings at "
            f"{api.endpoint}/{repo}/settings"
        )
    return False


def may_not_write(repo: str) -> str:
    return (
        f"the token has no write access to {repo}; create one that has, and give it to `hf auth "
        "login` or HF_TOKEN"
    )


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of what the hub has answered, or None where it has not."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explained(error: BaseException) -> str:
    """Return what to do about a failure of the network or of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    again = "then push again: what has arrived is not sent again"
    if not isinstance(error, HfHubHTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({error}); check the network, and "
            f"HF_ENDPOINT if it is set, {again}"
        )
    status = status_of(error)
    text = " ".join((error.server_message or str(error)).split())
    if status == 429 or (status is not None and status >= 500):
        return f"{constants.ENDPOINT} fails ({status}: {text}); wait, {again}"
    return f"{constants.ENDPOINT} refuses the push ({status}: {text})"


def why_failed(error: BaseException, repo: str) -> str | None:
    """Return what to do about what `upload` raised; None where neither hub nor network did it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and a push needs the network; unset it"
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    if not isinstance(cause, HfHubHTTPError | HTTPError | OSError):
        return None
    return may_not_write(repo) if status_of(cause) in (401, 403) else explained(cause)
