"""What a run that is to be pushed needs of where its ranks are: asked before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardwright.train.config import CheckpointConfig
from shardwright.train.publishing.upload import NO_TOKEN

_TRUE = {"1", "on", "yes", "true"}


def problems(
    settings: CheckpointConfig, environment: Mapping[str, str], *, has_token: bool
) -> Iterator[str]:
    """Yield why nothing could be pushed from here. Pure."""
    if settings.push_to is None:
        return
    key = f"checkpoint.push_to={settings.push_to}"
    if environment.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        yield (
            f"{key} needs the network, and HF_HUB_OFFLINE={environment['HF_HUB_OFFLINE']} is set; "
            "unset it, or leave checkpoint.push_to out and `shardwright push` the run later"
        )
    elif not has_token:
        yield f"{key}: {NO_TOKEN}"


def has_token() -> bool:
    """Whether the hub's own library finds a token: in HF_TOKEN, or where `hf auth login` put it."""
    from huggingface_hub import get_token

    return get_token() is not None
