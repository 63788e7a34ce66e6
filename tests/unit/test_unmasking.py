"""Masks are filled over several passes, those first of which the model is surest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import OBJECTIVE_KEY
from shardwright.train.sampling import sample as sampling
from shardwright.train.sampling.sample import objective_of, sample, show
from shardwright.train.sampling.unmasking import filled
from tests.unit.saved_models import POSITIONS, TOKENS, save

MASK, VOCABULARY = 0, 12


class Oracle:
    """Knows what belongs at each place: surely beside what is known, and hardly elsewhere."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids.tolist())
        logits = torch.zeros(len(ids), VOCABULARY)
        for place in range(len(ids)):
            knows = place > 0 and ids[place - 1] != MASK
            logits[place, 1 + place % 9] = 30.0 if knows else 12.0 - place / 10
        logits[:, [MASK, 11]] = 99.0  # what is no token of a text is not put in
        return logits


@pytest.mark.parametrize(
    ("steps", "left"), [(None, [5, 4, 3, 2, 1]), (2, [5, 2]), (1, [5]), (9, [5, 4, 3, 2, 1])]
)
def test_as_many_masks_are_filled_in_each_pass(steps: int | None, left: list[int]) -> None:
    oracle = Oracle()
    found = filled(oracle, torch.tensor([5, 0, 0, 7, 0, 0, 0]), MASK, range(1, 11), steps=steps)
    assert [row.count(MASK) for row in oracle.seen] == left
    assert found.tolist() == [5, 2, 3, 7, 5, 6, 7]


def test_the_surest_are_filled_first() -> None:
    oracle = Oracle()
    filled(oracle, torch.tensor([5, 0, 0, 0]), MASK, range(1, 11))
    assert oracle.seen == [[5, 0, 0, 0], [5, 2, 0, 0], [5, 2, 3, 0]]


def test_a_text_without_masks_needs_no_pass() -> None:
    oracle = Oracle()
    assert filled(oracle, torch.tensor([5, 6]), MASK, range(1, 11)).tolist() == [5, 6]
    assert oracle.seen == []


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a RoBERTa of random weights whose config says that it was trained by diffusion."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(TOKENS), max_position_embeddings=POSITIONS + 2, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, type_vocab_size=1,
    )  # fmt: skip
    setattr(config, OBJECTIVE_KEY, "diffusion")
    return save(RobertaForMaskedLM(config), tmp_path_factory.mktemp("diffusion"))


def test_a_prompt_without_a_mask_is_continued(diffusion: Path) -> None:
    assert objective_of(diffusion) == "diffusion"
    first, again, other = (
        sample(diffusion, ["def "], new_tokens=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    ((text,),) = first
    assert len(text) == 8
    assert not set(text) & {"<", ">"}, "no special token"
    ((few,),) = sample(diffusion, ["def "], new_tokens=8, steps=2, seed=1)
    assert len(few) == 8
    ((end,),) = sample(diffusion, ["d" * (POSITIONS - 3)], new_tokens=1000)
    assert len(end) <= 3


def test_masks_are_filled_within_the_text(diffusion: Path) -> None:
    ((text,),) = sample(diffusion, ["a <mask> b<mask>"])
    assert isinstance(text, sampling.Whole)
    assert text.startswith("a")
    assert "<mask>" not in text
    out = io.StringIO()
    show(diffusion, ["a<mask>b", "def"], out, new_tokens=3)
    assert "\n  a<mask>b\n    a" in out.getvalue()
    assert "\n  def│" in out.getvalue()


def test_a_prompt_that_leaves_no_room_is_refused(diffusion: Path) -> None:
    with pytest.raises(UserError, match="this model takes at most 63, shorten it"):
        sample(diffusion, ["y" * 64])


def test_passes_are_for_diffusion_alone(diffusion: Path, tmp_path: Path) -> None:
    for path in diffusion.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree[OBJECTIVE_KEY]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert objective_of(tmp_path) == "mlm"
    with pytest.raises(UserError) as raised:
        sample(tmp_path, ["a<mask>"], steps=3)
    assert str(raised.value) == (
        "--steps=3 is for models of objective=diffusion, which fill masks over several passes, "
        "and this one is of objective=mlm; leave it out"
    )
