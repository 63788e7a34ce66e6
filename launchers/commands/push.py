"""`shardwright push`: upload a model directory with its card to a hub, once it is found whole."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.console import progress, terminal
from shardwright.train.errors import FAILED, UserError
from shardwright.train.model import user_modules
from shardwright.train.paths import absolute
from shardwright.train.process.logs import quiet_libraries
from shardwright.train.units import size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
README = "README.md"

# What belongs to a model, by name. All else is left out and named: a directory of weights may well
# have an optimizer's state, a log or a key beside them.
_FILES = {
    README,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "processor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
}
_ENDINGS = (".svg", ".png", ".jpg", ".model")  # pictures of the card, sentencepiece's vocabulary

_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
}
_PLACEHOLDERS = ("[More Information Needed]", 'model="PATH', "TODO", "YOUR_")


@dataclass(frozen=True)
class Chosen:
    """What of a directory is uploaded."""

    files: list[Path]
    left_out: dict[str, str]
    """Why, by name."""


def main(arguments: Sequence[str]) -> int:
    """Check a model directory and upload it; with --dry-run, show what that would be."""
    from shardwright.train.sampling.sample import model_directory

    options = parser().parse_args(arguments)
    check_repo_name(options.repo)
    directory = model_directory(Path(absolute(options.directory)))
    chosen = choose(directory)
    with progress.phase(f"checking {directory}", console=sys.stderr):
        user_modules.import_for(directory, options.imports)
        check(directory, chosen, trusts_code=options.trust_remote_code)

    if not options.dry_run:
        terminal.outlive()
    print(f"{'would push' if options.dry_run else 'pushing'} {directory} to {options.repo}")
    for path in chosen.files:
        print(f"  {size(path.stat().st_size):>8}  {path.name}")
    for name, reason in chosen.left_out.items():
        print(f"  left out  {name}: {reason}")
    print(f"  {size(sum(path.stat().st_size for path in chosen.files)):>8}  in all", flush=True)
    readme = (directory / README).read_text(encoding="utf-8")
    for warning in card_warnings(readme):
        print(f"warning: {README} {warning}", file=sys.stderr)
    if options.dry_run:
        visibility = "public" if options.public else "private"
        print(f"  as a {visibility} model, in one commit; its card:\n\n{readme}", end="")
        return 0

    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        print(_upload(directory, chosen.files, readme, options))
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the network; unset it") from None
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, HfHubHTTPError | HTTPError | OSError):
            raise
        if _status(cause) in (401, 403):
            raise UserError(_may_not_write(options.repo)) from None
        print(f"error: {explained(cause)}", file=sys.stderr)
        return FAILED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright push`."""
    found = argparse.ArgumentParser(
        prog="shardwright push",
        description="Upload a Hugging Face model directory, or the final/ of a run, with its model "
        "card, once it is found whole. The token is that of `hf auth login`, or HF_TOKEN.",
        epilog="Exit codes: 0, 1 where the hub or the network fails, 2 on bad input.",
    )
    found.add_argument("directory", type=Path, metavar="DIR")
    found.add_argument("repo", metavar="REPO", help="NAME or OWNER/NAME on the hub")
    found.add_argument(
        "--public",
        action="store_true",
        help="visible to everyone; by default a new model is private",
    )
    found.add_argument("--revision", help="branch to commit to, created if it is missing")
    found.add_argument(
        "--tag",
        action="append",
        default=[],
        help="name for what is uploaded, such as v1.0, that stays with it; may be repeated",
    )
    found.add_argument("--message", help="of the commit (default: Upload NAME)")
    found.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model, to check that it loads; read it first",
    )
    user_modules.add_flag(found)
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="check, show the files and the card; do not use the network",
    )
    return found


# --- what is uploaded ---------------------------------------------------------------------------


def choose(directory: Path) -> Chosen:
    """Return the files of a directory that make the model, and why the others do not.

    Raises UserError where a file that the index names is missing, or there are no weights.
    """
    found = sorted(directory.iterdir())
    weights = _weights(directory, {path.name for path in found})
    wanted = weights | _code(directory) | _FILES
    files, left_out = [], {}
    for path in found:
        name = path.name
        if not path.is_file():
            left_out[name] = "no file"
        elif name in wanted or (name.endswith(_ENDINGS) and not name.startswith(".")):
            files.append(path)
        elif name.endswith(".safetensors"):
            left_out[name] = f"{INDEX if INDEX in weights else WEIGHTS} does not name it"
        else:
            left_out[name] = "not part of a model"
    return Chosen(files, left_out)


def _weights(directory: Path, names: set[str]) -> set[str]:
    """Return the names of the weights' files, the index among them, out of all names."""
    if INDEX in names:
        try:
            place = json.loads((directory / INDEX).read_bytes())["weight_map"].values()
            wanted = {str(name) for name in place}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / INDEX} cannot be read ({error}); {_MAKE}") from None
        if WEIGHTS in names - wanted:
            raise UserError(
                f"{directory} has both {WEIGHTS} and {INDEX}, which names other files: "
                "`from_pretrained` would load the former; delete the one that is not wanted"
            )
        if missing := sorted(wanted - names):
            raise UserError(
                f"{directory}: {INDEX} names {missing[0]}"
                + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
                + f", which is missing; {_MAKE}"
            )
        return wanted | {INDEX}
    if WEIGHTS not in names:
        raise UserError(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}; {_MAKE}")
    return {WEIGHTS}


_MAKE = "`shardwright recover CHECKPOINT OUT` makes a complete directory"


def _code(directory: Path) -> set[str]:
    """Return the Python files that config.json says the model is made of, and what they import."""
    from shardwright.train.model import remote_code

    try:
        tree = json.loads((directory / "config.json").read_bytes())
        return set(remote_code.beside(directory, tree))
    except (ValueError, AttributeError):
        return set()


def check(directory: Path, chosen: Chosen, *, trusts_code: bool = False) -> None:
    """Raise UserError unless card and weights are what a hub and `from_pretrained` take."""
    if directory.name.startswith(".") and directory.name.endswith((".tmp", ".old")):
        raise UserError(
            f"{directory} is left from an interrupted write; give the directory without the dot, "
            "or make it again"
        )
    names = {path.name for path in chosen.files}
    if README not in names:
        raise UserError(
            f"{directory / README} is missing: without a card nobody knows what the model is "
            "for; write one, or give the directory that the run or `shardwright recover` has "
            "made"
        )
    for path in chosen.files:
        if not path.name.endswith((".safetensors", *_ENDINGS)):
            _check_secrets(path)
    check_card((directory / README).read_text(encoding="utf-8", errors="replace"))
    _check_loads(directory, trusts_code=trusts_code)


def _check_secrets(path: Path) -> None:
    content = path.read_bytes()
    for what, pattern in _SECRETS.items():
        if pattern.search(content):
            raise UserError(
                f"{path} holds what looks like {what}: it would be uploaded too; remove it, and "
                "revoke it if others have seen the file"
            )


def check_card(readme: str) -> None:
    """Raise UserError where the hub's own library cannot read a card's header."""
    from huggingface_hub import ModelCard

    where = f"{README}: its header, between two lines of ---,"
    if not re.match(r"---[ \t]*\r?\n.*?\n---[ \t]*\r?\n", readme, re.DOTALL):
        raise UserError(f"{where} is missing; a hub reads from it what the model is for")
    try:
        data = ModelCard(readme).data
    except Exception as error:  # whatever its YAML parser or its checks raise
        text = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read ({text}); correct it") from None
    for name in ("pipeline_tag", "license", "library_name"):
        if not isinstance(data.get(name, ""), str):
            raise UserError(f"{where} has {name}: {data.get(name)}, which is not text; correct it")


def card_warnings(readme: str) -> list[str]:
    """Return what a reader of the card would miss. Pure."""
    from shardwright.train.export.card_text import MODEL_PLACEHOLDER

    found = [text for text in _PLACEHOLDERS if text in readme.replace(MODEL_PLACEHOLDER, "")]
    problems = [f"still has the placeholder {text!r}; fill it in" for text in found]
    header = readme.split("\n---", 1)[0]
    if not re.search(r"^license:", header, re.MULTILINE):
        problems.append("names no license: add `license:` to its header, or nobody may use it")
    return problems


def _check_loads(directory: Path, *, trusts_code: bool) -> None:
    """Let `from_pretrained` find every weight, on the meta device. Raises UserError."""
    quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from shardwright.train.model.directory import check_loads
    from shardwright.train.sampling.sample import check_code, is_masked

    check_code(directory, trusts_code=trusts_code)
    try:
        auto = AutoModelForMaskedLM if is_masked(directory) else AutoModelForCausalLM
        check_loads(directory, auto, trusts_code=trusts_code)
    except Exception as error:  # transformers, safetensors and torch raise what they like
        text = " ".join(str(error).split())
        raise UserError(f"`from_pretrained` does not load it: {text}; {_MAKE}") from None


# --- the upload ---------------------------------------------------------------------------------


def check_repo_name(repo: str) -> None:
    """Raise UserError for a name that a hub does not take."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        text = str(error).partition(" Use `repo_type`")[0]
        raise UserError(f"REPO={repo} is not a valid name on a hub: {text}") from None


def _upload(directory: Path, files: Sequence[Path], readme: str, options: Any) -> str:
    """Upload all files in one commit; return what to tell. Raises what the hub's library raises."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    from shardwright.train.export.card_text import MODEL_PLACEHOLDER

    if not sys.stderr.isatty():
        disable_progress_bars()
    warnings.filterwarnings("ignore", "Warnings while validating metadata")
    if get_token() is None:
        raise UserError(
            "no token was found: run `hf auth login`, or set HF_TOKEN, to one with write access"
        )
    api = HfApi()
    me = _who(api)
    repo = options.repo if "/" in options.repo else f"{me['name']}/{options.repo}"
    _check_namespace(repo, me)
    created = _ensure(api, repo, public=options.public)
    revision = options.revision
    if revision not in (None, "main"):
        api.create_branch(repo, branch=revision, exist_ok=True)

    if not created:
        _check_tags(api, repo, options.tag)

    names = {path.name for path in files}
    # What stays of an older model could be loaded in place of this one.
    stale = [
        name
        for name in ([] if created else api.list_repo_files(repo, revision=revision))
        if re.fullmatch(r"[^/]+\.(safetensors|safetensors\.index\.json|bin)", name)
        and name not in names
    ]
    for name in stale:
        print(f"  deletes   {name}: weights of an older model")
    contents: dict[str, Path | bytes] = {path.name: path for path in files}
    contents[README] = readme.replace(MODEL_PLACEHOLDER, repo).encode()
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
        ],
        commit_message=options.message or f"Upload {directory.name}",
        revision=revision,
    )
    for tag in options.tag:
        api.create_tag(repo, tag=tag, revision=commit.oid)
    visibility = "public" if options.public else "private"
    tags = "".join(f"\n  tag       {tag}" for tag in options.tag)
    return f"done\n  {visibility:<8}  {api.endpoint}/{repo}\n  commit    {commit.oid}{tags}"


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
        if _status(error) == 401:
            raise UserError(
                f"{api.endpoint} does not accept the token: it is invalid or has expired; run "
                "`hf auth login`, or set HF_TOKEN, to a valid one"
            ) from None
        raise


def _check_namespace(repo: str, me: dict[str, Any]) -> None:
    """Raise UserError where a repository lies with none of whom the pusher can be."""
    owners = [str(me["name"]), *(str(org["name"]) for org in me.get("orgs", []) if "name" in org)]
    owner, name = repo.split("/")
    if owner not in owners:
        raise UserError(
            f"REPO={repo} belongs to {owner}, and this token belongs to {me['name']}"
            + (f", a member of {', '.join(owners[1:])}" if owners[1:] else "")
            + f"; push to {me['name']}/{name}, or use a token of {owner}"
        )


def _ensure(api: HfApi, repo: str, *, public: bool) -> bool:
    """Make the repository where it is missing; return whether it was.

    Raises UserError where it is there in the other visibility, or may not be made.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        is_private = bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        try:
            api.create_repo(repo, private=not public)
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise UserError(_may_not_write(repo)) from None
            raise
        return True
    if is_private == public:
        have, want = ("private", "public") if is_private else ("public", "private")
        way = f"leave --public out to push to a {have} model" if public else "add --public"
        raise UserError(
            f"{repo} exists and is {have}, but {want} was requested; a push does not change "
            f"that: {way}, choose another name, or make it {want} in its settings at "
            f"{api.endpoint}/{repo}/settings"
        )
    return False


def _may_not_write(repo: str) -> str:
    return (
        f"the token has no write access to {repo}; create one that has, and give it to `hf auth "
        "login` or HF_TOKEN"
    )


def _status(error: BaseException) -> int | None:
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
    status = _status(error)
    text = " ".join((error.server_message or str(error)).split())
    if status == 429 or (status is not None and status >= 500):
        return f"{constants.ENDPOINT} fails ({status}: {text}); wait, {again}"
    return f"{constants.ENDPOINT} refuses the push ({status}: {text})"
