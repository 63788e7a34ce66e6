"""The section "adapter": small matrices that are trained beside pretrained weights, which stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from shardwright.train.config.section import Fraction, PositiveFloat, PositiveInt, Section, Strings

PACKAGE = "peft"
ALL_LINEAR = "all-linear"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class NoAdapter(Section):
    """All weights are trained."""

    kind: Literal["none"] = "none"
    trains_all: ClassVar[bool] = True
    in_words: ClassVar[str] = "none"

    def contradictions(self) -> Iterator[str]:
        yield from ()


class _Adapter(Section):
    """What all adapters have."""

    trains_all: ClassVar[bool] = False
    target_modules: Annotated[Strings, BeforeValidator(_listed)] | None = None
    """Linear layers that get one, by the end of their names, such as [q_proj, v_proj]; all-linear
    is each but the head. null is peft's choice for the architecture, all-linear where it has none.
    """
    modules_to_save: Annotated[Strings, BeforeValidator(_listed)] = ()
    """Modules that are trained whole besides, by the end of their names, such as [lm_head]."""
    export: Literal["both", "merged"] = "both"
    """What final/ holds: whole weights with the adapter added to them (merged), and in
    final/adapter/ the adapter by itself as peft keeps it, too (both)."""

    def contradictions(self) -> Iterator[str]:
        """Yield a message for each pair of its own values that cannot both be meant."""
        targets = self.target_modules
        if targets is not None and not targets:
            yield (
                "adapter.target_modules=[] leaves nothing to train; name some, or set it to null "
                "or all-linear"
            )
        if targets is not None and ALL_LINEAR in targets and len(targets) > 1:
            others = ", ".join(name for name in targets if name != ALL_LINEAR)
            yield (
                f"adapter.target_modules has all-linear and {others}, which it includes where they "
                "are linear layers; leave one of them out"
            )


class LowRankAdapter(_Adapter):
    """What LoRA and its kin have."""

    kind: Literal["lora", "dora"]
    rank: PositiveInt = 8
    """Rows of the first matrix and columns of the second, whose product is added to a weight."""
    alpha: PositiveFloat = 16.0
    """The product is multiplied by alpha / rank."""
    rank_stabilized: bool = False
    """Multiply it by alpha / sqrt(rank) instead, which suits high ranks."""
    dropout: Fraction = 0.0
    """On what goes into the first matrix."""

    @property
    def in_words(self) -> str:
        return f"{self.kind}, rank {self.rank}, alpha {self.alpha:g}"

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class LoraAdapter(LowRankAdapter):
    """LoRA: a product of two small matrices is added to a weight."""

    kind: Literal["lora"]


class DoraAdapter(LowRankAdapter):
    """DoRA: the same, and the length of each output's weights is trained by itself."""

    kind: Literal["dora"]


class Ia3Adapter(_Adapter):
    """IA3: a factor for each output of a layer, or for each input of those of the MLP."""

    kind: Literal["ia3"]
    feedforward_modules: Annotated[Strings, BeforeValidator(_listed)] | None = None
    """Those of target_modules whose inputs are multiplied, not their outputs; null is peft's choice
    for the architecture."""

    @property
    def in_words(self) -> str:
        return self.kind

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        forward, targets = self.feedforward_modules, self.target_modules
        if (forward is None) != (targets is None):
            known, other = ("target_modules", "feedforward_modules")
            if targets is None:
                known, other = other, known
            yield (
                f"adapter.{known} is given and adapter.{other}=null, which is peft's choice for "
                "layers of its own choice; give both or neither"
            )
        for name in forward or ():
            if targets is not None and name not in targets:
                yield (
                    f"adapter.feedforward_modules has {name}, which is not one of "
                    f"adapter.target_modules={list(targets)}; add it there, or leave it out"
                )


AdapterConfig = Annotated[
    NoAdapter | LoraAdapter | DoraAdapter | Ia3Adapter, Field(discriminator="kind")
]
