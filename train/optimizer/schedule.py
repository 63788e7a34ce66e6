"""Our names of the schedules, and those of transformers."""

from __future__ import annotations

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "warmup_stable_decay": "warmup_stable_decay",
    "inverse_sqrt": "inverse_sqrt",
}
