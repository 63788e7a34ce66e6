"""A process beside rank 0: started once, heard without waiting, told how the run ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from shardwright.train import program


class Companion:
    """Runs a module that writes a JSON object a line, and reads one word once the run has ended.

    It can neither stop a run nor hold it up. Starting raises OSError where there is no room for it.
    """

    def __init__(self, module: str, arguments: Sequence[str], tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self._heard = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **program.package_environment(os.environ)},
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def hear(self) -> None:
        """Tell what it has said by now, without waiting for it."""
        assert self.process.stdout is not None
        while read := self.process.stdout.read(4096):
            self._heard += read
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._tell(json.loads(line))

    def end(self, outcome: str, seconds: float) -> int | None:
        """Let it end; return its exit code, None where it took longer and was killed."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended
            self.process.stdin.write(f"{outcome}\n".encode())
            self.process.stdin.close()
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.hear()
            time.sleep(0.05)
        is_late = self.process.poll() is None
        if is_late:
            self.process.kill()
        code = self.process.wait()
        self.hear()
        return None if is_late else code
