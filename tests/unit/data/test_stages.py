"""Stages: what a run sees in each, on any number of ranks and from any position on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.config import MlmObjective, RankLayout, RunConfig
from shardwright.train.config.data import TextData
from shardwright.train.data import Prepared, prepare
from shardwright.train.data.batches.collator import Masking
from shardwright.train.data.batches.loader import train_loader
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.batches.stages import Stages, stages_of
from shardwright.train.errors import UserError

MakeConfig = Callable[..., RunConfig]
Row = tuple[tuple[int, ...], tuple[int, ...]]
STEP = 16 * 32
"""Tokens."""
STAGES = [
    {"tokens": 3 * STEP, "weights": [1, 0]},
    {"tokens": 4 * STEP - 100, "weights": [0.5, 3], "sequence_length": 128},
    {"sequence_length": 16},
]
SIZES = [16] * 3 + [4] * 4 + [32] * 3
"""Samples of each step: a step that has begun in a stage is of it as a whole."""


def rows(batches: Iterable[object]) -> list[Row]:
    return [
        (tuple(ids), tuple(labels))
        for batch in batches
        if isinstance(batch, dict)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]


@pytest.fixture
def folders(tmp_path: Path, sentences: Callable[..., str]) -> list[str]:
    paths = []
    for name, letter in (("plain", "e"), ("accented", "é")):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(20):
            text = sentences(80, seed=i + ord(letter)).replace("e", letter)
            (folder / f"{i}.txt").write_text(text)
        paths.append(str(folder))
    return paths


@pytest.fixture(params=["clm", "mlm"])
def config(
    request: pytest.FixtureRequest, folders: list[str], make_config: MakeConfig
) -> RunConfig:
    data = {"paths": folders, "stages": STAGES}
    return make_config(mlm=request.param == "mlm", data=data)


@pytest.fixture
def prepared(config: RunConfig, run_dir: Path) -> Prepared:
    return prepare(config, run_dir)


def steps(
    config: RunConfig, prepared: Prepared, world_size: int, first: int, count: int
) -> list[list[Row]]:
    """Return what each step of a run sees that begins, or is resumed, at step ``first``."""
    loaders = [
        list(
            train_loader(
                prepared,
                config,
                rank=rank,
                layout=RankLayout(replicas=world_size),
                start_sample=16 * first,
                total_steps=count,
            )
        )
        for rank in range(world_size)
    ]
    accumulation = 4 // world_size
    return [
        sorted(
            row
            for loader in loaders
            for row in rows(loader[step * accumulation : (step + 1) * accumulation])
        )
        for step in range(count)
    ]


def test_a_resume_at_another_world_size_inside_each_stage_sees_the_same(
    config: RunConfig, prepared: Prepared
) -> None:
    whole = steps(config, prepared, 1, 0, 10)
    assert [len(step) for step in whole] == SIZES
    assert [len(step[0][0]) * len(step) for step in whole] == [STEP] * 10
    for world_size in (1, 2, 4):
        for first in (0, 1, 4, 6, 8):
            assert steps(config, prepared, world_size, first, 10 - first) == whole[first:]
    seen = [row for step in whole[3:7] for row in step]
    assert len(set(seen)) == len(seen), "no sample comes twice before all have come"


def test_a_first_stage_is_what_a_run_without_stages_sees(
    folders: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    """And later ones are views of the same tokens, with nothing prepared anew."""
    found = []
    for name, stages in (("without", []), ("with", [{"tokens": 2 * STEP}, {}])):
        (tmp_path / name).mkdir()
        config = make_config(data={"paths": folders, "stages": stages})
        prepared = prepare(config, tmp_path / name)
        found.append(steps(config, prepared, 2, 0, 4))
    assert found[0][:2] == found[1][:2]
    assert found[0][2:] != found[1][2:], "a stage has an order of its own"
    assert len([*(tmp_path / "cache/tokens").glob("*/index.json")]) == 1


def test_weights_are_those_of_the_stage(config: RunConfig, prepared: Prepared) -> None:
    accented = {i for token, i in prepared.tokenizer.get_vocab().items() if "Ã©" in token}
    assert accented

    def has_any(step: list[Row]) -> list[bool]:
        return [bool(accented & {*ids, *labels}) for ids, labels in step]

    whole = steps(config, prepared, 1, 0, 10)
    assert not any(any(has_any(step)) for step in whole[:3]), "the first leaves that path out"
    later = [found for step in whole[3:7] for found in has_any(step)]
    assert any(later)


@given(
    steps=st.integers(1, 40),
    lengths=st.lists(st.sampled_from([8, 16, 32, 64, 128, 256]), min_size=1, max_size=4),
    tokens=st.lists(st.integers(1, 9000), min_size=3, max_size=3),
)
def test_steps_of_a_stage_take_samples_that_follow_one_another(
    steps: int, lengths: list[int], tokens: list[int]
) -> None:
    stages: list[dict[str, Any]] = [{"sequence_length": length} for length in lengths]
    for stage, count in zip(stages[:-1], tokens, strict=False):
        stage["tokens"] = count
    data = TextData.model_validate(
        {"kind": "text", "paths": ("x",), "sequence_length": 32, "stages": stages}
    )
    found = stages_of(data, [100] * len(stages))
    assert found is not None
    expected: dict[int, int] = {}
    for step in range(steps):
        position = 8 * step
        at = found.at(position)
        assert found.size(at, 8) * lengths[at] == 8 * 32
        first = found.first(at, position)
        assert first == expected.get(at, first)
        expected[at] = first + found.size(at, 8)
        began = sum(tokens[:at])
        assert position * 32 >= began
        if at < len(lengths) - 1:
            assert position * 32 < began + tokens[at] + 32


def test_no_stages_are_none() -> None:
    data = TextData.model_validate({"kind": "text", "paths": ("x",), "sequence_length": 32})
    assert stages_of(data, []) is None
    assert Stages((0, 5), (32, 64), 32, (1, 1)).at(5) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stages": [{}, {}]}, r"stages\[0\] has no tokens, but is followed by another; say after"),
        ({"stages": [{"tokens": 5}]}, r"stages\[0\] is the last one, and has tokens=5; leave that"),
        (
            {"stages": [{"weights": [1.0, 2.0]}]},
            r"stages\[0\]\.weights has 2 values and the corpus has 1 parts; give one weight for",
        ),
        ({"stages": [{"weights": [0]}]}, r"stages\[0\]\.weights leaves nothing to train on"),
        (
            {"stages": [{}], "line_by_line": True},
            r"data\.stages are views .* data\.line_by_line=tr",
        ),
        (
            {"stages": [{}], "packing": "best_fit"},
            r"data\.stages are .* data\.packing=best_fit; le",
        ),
        (
            {"stages": [{"sequence_length": 256}]},
            r"data\.stages\[0\]\.sequence_length=256 is longer than the 130 positions of the model",
        ),
        (
            {"stages": [{"sequence_length": 48}]},
            r"data\.stages\[0\]\.sequence_length=48 does not divide a step, which has "
            r"trainer\.global_batch_size=16 x data\.sequence_length=32 tokens in every stage; set "
            r"trainer\.global_batch_size to a multiple of 3, or another length",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(
    make_config: MakeConfig, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(data=changed)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"max_steps": None, "max_epochs": 1.0},
            r"data\.stages count in tokens, but trainer\.max_epochs=1\.0 in epochs, of which each",
        ),
        (
            {"micro_batch_size": 1},
            r"data\.stages\[1\]\.sequence_length=64 is more than a micro-batch has, "
            r"trainer\.micro_batch_size=1 x data\.sequence_length=32 tokens; set "
            r"trainer\.micro_batch_size=2 or more",
        ),
        (
            {"batch_warmup_from": 8, "batch_warmup_samples": 100},
            r"data\.stages\[1\]\.sequence_length=64 is not data\.sequence_length=32, and with "
            r"trainer\.batch_warmup_from=8 a step may have any number of tokens",
        ),
    ],
)
def test_stages_and_the_batch_agree(
    make_config: MakeConfig, trainer: dict[str, Any], message: str
) -> None:
    trainer = {"max_steps": 5, "global_batch_size": 16, "micro_batch_size": 4, **trainer}
    stages = [{"tokens": 1000}, {"sequence_length": 64}]
    with pytest.raises(UserError, match=message):
        make_config(data={"stages": stages}, trainer=trainer)


def test_a_stage_too_small_for_a_batch_is_an_error(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    for path in corpus.iterdir():
        path.write_text(path.read_text()[:100])
    trainer = {"max_steps": 5, "global_batch_size": 16, "micro_batch_size": 4}
    config = make_config(data={"stages": [{"weights": [0.01]}]}, trainer=trainer)
    with pytest.raises(
        UserError,
        match=r"data\.stages\[0\] is too small for one batch: it has \d+ samples of 32 tokens, and "
        r"trainer\.global_batch_size=16 needs 16; give more text, shorten its samples, raise",
    ):
        prepare(config, run_dir)


def test_an_occurrence_of_a_sample_in_another_stage_has_other_masks() -> None:
    few = np.arange(4)
    objective = MlmObjective(kind="mlm", masking_rate=0.5)
    masking = Masking(objective, mask=3, special=few, ordinary=np.arange(4, 90), seed=0)
    window = Window(np.arange(4, 68), None)
    first, again, other = (
        masking(window, SampleKey(0, 7, stage=stage))[1].tolist() for stage in (0, 0, 1)
    )
    assert first == again != other
