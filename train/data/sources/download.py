"""One text by URL, downloaded once and kept in the cache."""

from __future__ import annotations

import http.client
import shutil
import urllib.request
from pathlib import Path

from shardwright.train.data.tokens.cache import build_once, fingerprint
from shardwright.train.errors import UserError

TIMEOUT_SECONDS = 60.0


def fetch(url: str, cache_dir: Path) -> Path:
    """Return the local copy of a URL; raise UserError where it cannot be downloaded."""

    def download(directory: Path) -> dict[str, object]:
        request = urllib.request.Request(url, headers={"User-Agent": "shardwright"})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
            (directory / "text.txt").open("wb") as file,
        ):
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise http.client.IncompleteRead(b"", int(expected) - file.tell())
        return {"url": url}

    try:
        return build_once(cache_dir / "downloads", fingerprint(url), download).path / "text.txt"
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"data.urls: cannot download {url} ({getattr(error, 'reason', None) or error}); "
            "correct the address. Without a network download it elsewhere and use "
            "data=text data.paths=[FILE]"
        ) from None
