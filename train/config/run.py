"""RunConfig: the sections of a run, which agree with each other."""

from __future__ import annotations

from pydantic import model_validator

from shardwright.train.config.rules.sections import contradictions
from shardwright.train.config.sections import Sections


class RunConfig(Sections):
    """One run, whole. It round-trips through ``config.yaml``."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
