"""`shardwright push`: upload a model directory with its card to a hub, once it is found whole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shardwright.train.console import progress, terminal
from shardwright.train.errors import FAILED, UserError
from shardwright.train.model import user_modules
from shardwright.train.paths import absolute
from shardwright.train.publishing.contents import README, Chosen, card_warnings, check, choose
from shardwright.train.publishing.upload import (
    Target,
    check_repo_name,
    may_not_write,
    upload,
    why_failed,
)
from shardwright.train.units import size


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

    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        print(_push(directory, chosen, options))
    except Exception as error:
        text = why_failed(error, options.repo)
        if text is None or isinstance(error, UserError):
            raise
        if isinstance(error, OfflineModeIsEnabled) or text == may_not_write(options.repo):
            raise UserError(text) from None
        print(f"error: {text}", file=sys.stderr)
        return FAILED
    return 0


def _push(directory: Path, chosen: Chosen, options: argparse.Namespace) -> str:
    """Upload what was chosen; return what to tell. Raises what `upload` raises."""
    target = Target(
        repo=options.repo,
        message=options.message or f"Upload {directory.name}",
        public=options.public,
        revision=options.revision,
        tags=tuple(options.tag),
    )
    pushed = upload(target, {path.name: path for path in chosen.files})
    visibility = "public" if options.public else "private"
    tags = "".join(f"\n  tag       {tag}" for tag in options.tag)
    return f"done\n  {visibility:<8}  {pushed.url}\n  commit    {pushed.commit}{tags}"


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
