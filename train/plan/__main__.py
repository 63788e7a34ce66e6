"""Say what a run's model is made of: `python -m shardwright.train.plan`, configs in, facts out.

One JSON object on each line of stdin, one on stdout. Nothing is trained, and no tensor has values.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from shardwright.train.errors import UserError


def main() -> int:
    """Answer each request; what is wrong with it is an answer, too."""
    # Libraries print to stdout as they like; what is read there is the answers alone.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(answer_to, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            try:
                answer = _answer(json.loads(line))
            except UserError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=out, flush=True)
    return 0


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    from shardwright.train.config import from_tree
    from shardwright.train.model.user_modules import import_all
    from shardwright.train.plan.model import facts_of, planned

    config = from_tree(asked["config"])
    import_all(config.model.imports)
    answer: dict[str, Any] = {}
    if asked.get("facts", True):
        answer["facts"] = facts_of(planned(config), config).as_json()
    if asked["autocasts"]:
        from shardwright.train.plan.trace import traced

        answer["traced"] = [
            traced(config, autocast=autocast).as_json() for autocast in asked["autocasts"]
        ]
    return answer


if __name__ == "__main__":
    sys.exit(main())
