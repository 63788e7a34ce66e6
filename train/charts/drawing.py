"""Draw charts, in a process of its own: `python -m shardwright.train.charts.drawing`.

vl-convert runs Vega in V8, which takes a hundred MiB, starts threads and ends its process where it
gets no memory: nothing that a rank, which has just finished its training, should be exposed to.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from shardwright.train import program
from shardwright.train.charts.charts import Spec

Format = Literal["svg", "png"]
TIMEOUT_SECONDS = 300
PIXELS_PER_UNIT = 2.0
"""Of a PNG, so that it is sharp on the screens of today."""


class CannotDraw(Exception):
    """Why there is no picture, in one line."""


def svg(spec: Spec) -> str:
    """Return a chart as an SVG. Raises CannotDraw."""
    (drawn,) = _drawn({"format": "svg", "specs": [spec]})
    return drawn.decode()


def pngs(specs: Sequence[Spec]) -> list[bytes]:
    """Return charts as PNGs. Raises CannotDraw."""
    return _drawn({"format": "png", "specs": list(specs)}) if specs else []


def javascript() -> str:
    """Return a script for a page that gives it `vegaEmbed`, with all of Vega. Raises CannotDraw."""
    (script,) = _drawn({"format": "javascript"})
    return script.decode()


def _drawn(request: dict[str, Any]) -> list[bytes]:
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request, allow_nan=False).encode(),
            capture_output=True,
            env={**os.environ, **program.package_environment(os.environ)},
            timeout=TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotDraw(f"the process that draws: {error}") from None
    if child.returncode != 0:
        *_, last = child.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        raise CannotDraw(f"the process that draws ended with {child.returncode}: {last}")
    return [base64.b64decode(each) for each in json.loads(child.stdout)]


def main() -> int:
    """Answer the request on stdin with what is drawn, as base64 in JSON."""
    request = json.load(sys.stdin)
    try:
        drawn = list(_answer(request))
    except ValueError as error:  # as vl-convert 1.9 raises of whatever Vega throws, stack and all
        print(" ".join(str(error).splitlines()[:2]), file=sys.stderr)
        return 1
    json.dump([base64.b64encode(each).decode() for each in drawn], sys.stdout)
    return 0


def _answer(request: Mapping[str, Any]) -> Iterator[bytes]:
    import vl_convert

    if request["format"] == "javascript":
        # The stub of 1.9 does not know that its argument has a default.
        bundle: Any = vl_convert.javascript_bundle
        yield bundle().encode()
    for spec in request.get("specs", ()):
        if request["format"] == "svg":
            yield vl_convert.vegalite_to_svg(spec).encode()
        else:
            yield vl_convert.vegalite_to_png(spec, scale=PIXELS_PER_UNIT)


if __name__ == "__main__":
    sys.exit(main())
