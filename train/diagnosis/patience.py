"""How long a rank may stand where it is before its run counts as hung. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardwright.train.diagnosis.beats import GONE, STOPPED, TRACED, Beat
from shardwright.train.process.heartbeat import Phase

MULTIPLE = 20
"""Of the longest step of this start: so long is waited for a rank in the middle of one."""
LEAST_SECONDS = 120.0
"""However short steps are: what a file server or a switch needs to come back."""
LEAST_EVALUATION_SECONDS = 600.0
"""For one batch of an evaluation, which may be the first of its shape."""
UNKNOWN_SECONDS = 1800.0
"""Where nothing is known yet: a first step, and a compilation; as collectives have it."""
LEAST_SAVE_SECONDS = 1800.0
SAVE_MULTIPLE = 10
GONE_SECONDS = 60.0
"""A rank that has ended without a word is its launcher's affair, for at least so long."""

Setting = float | Literal["auto"] | None


@dataclass(frozen=True)
class Patience:
    """What `trainer.hang_timeout_seconds` comes to."""

    setting: Setting
    grace_seconds: float = 0.0
    """How long a launcher takes at most to end what is left of a run."""

    def seconds(self, beat: Beat) -> float | None:
        """Return how long a rank may stand where it is; None for as long as it likes."""
        if self.setting is None or beat.is_ended or beat.state == TRACED:
            return None
        if beat.state == GONE:
            gone = GONE_SECONDS + self.grace_seconds
            return gone if self.setting == "auto" else max(self.setting, self.grace_seconds)
        if beat.phase == Phase.STARTING and beat.state != STOPPED:
            # Data may be prepared meanwhile, and weights be read, for as long as a disk takes.
            return None
        if beat.phase == Phase.COMPILE:
            return max(UNKNOWN_SECONDS, 0.0 if self.setting == "auto" else self.setting)
        if self.setting != "auto":
            known = SAVE_MULTIPLE * beat.longest_save_seconds if beat.phase == Phase.SAVE else 0.0
            return max(self.setting, known)
        if beat.phase == Phase.STARTING:
            return LEAST_SECONDS
        if beat.phase in (Phase.SAVE, Phase.ENDING):
            return max(LEAST_SAVE_SECONDS, SAVE_MULTIPLE * beat.longest_save_seconds)
        if not beat.longest_step_seconds:
            return UNKNOWN_SECONDS
        least = LEAST_EVALUATION_SECONDS if beat.phase == Phase.EVALUATION else LEAST_SECONDS
        return max(least, MULTIPLE * beat.longest_step_seconds)
