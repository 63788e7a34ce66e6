"""Our names of the schedules and of the shapes of a decay, and those of transformers."""

from __future__ import annotations

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "warmup_stable_decay": "warmup_stable_decay",
    "inverse_sqrt": "inverse_sqrt",
}

DECAYS = {"cosine": "cosine", "linear": "linear", "sqrt": "1-sqrt"}
