"""Training speed with the optimizer in host memory, against the same model wholly on the GPU.

What `benchmarks.train_gpu --model llama_7b_offloaded` measures, by a name of its own: seven billion
parameters under ZeRO-2 and FSDP, offloaded, whose peer is FSDP that is not.
"""

from __future__ import annotations

import sys

from benchmarks import train_gpu

MODEL = "llama_7b_offloaded"


def main(argv: list[str]) -> int:
    return train_gpu.main(["--model", MODEL, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
