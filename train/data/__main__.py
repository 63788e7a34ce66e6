"""Prepare a run's tokenizer and tokens before its ranks start: python -m train.data RUN_DIR."""

import argparse
import logging
import sys
from pathlib import Path

from train import config, stop
from train.data.prepare import prepare
from train.errors import BAD_INPUT, RESUMABLE, UserError


def main() -> int:
    stop.install()
    parser = argparse.ArgumentParser(prog="python -m train.data", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory that holds the run's config.yaml")
    run_dir = parser.parse_args().run_dir
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        with stop.at_once():
            prepare(config.load(run_dir), run_dir)
    except stop.Stop:
        return RESUMABLE  # what it was building is gone, and what it had built is whole
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    code = main()
    stop.is_over()
    sys.exit(code)
