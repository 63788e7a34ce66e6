"""The shared worker processes, for checkpoints to damage."""

from __future__ import annotations

from tests.distributed.conftest import ranks as ranks
