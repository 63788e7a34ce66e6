"""Each rank's own stream of random numbers, from which dropout is drawn; no two share one.

Nothing else of a run is drawn from it: weights are drawn by their names, the order of samples and
the masks of masked models by the sample, each from generators of their own. So no rank needs to
draw what another draws.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def begin(seed: int, step: int, part: int) -> None:
    """Begin the stream of whoever has a part of the batch, from a step on, on every device.

    It is a function of the run's seed, of the step and of the part alone.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, dtype=np.uint32))
