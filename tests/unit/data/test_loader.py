"""Loaders: what each rank gets to train on and to evaluate, from text to tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.data import Prepared, prepare
from shardwright.train.data.batches.loader import eval_loader, train_loader, workers

MakeConfig = Callable[..., RunConfig]
Batch = dict[str, torch.Tensor]


def rows(batches: Iterable[object]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (input_ids, labels) of each sample, without padding."""
    found = []
    for batch in batches:
        assert isinstance(batch, dict)
        ids, labels = batch["input_ids"], batch["labels"]
        lengths = batch.get("attention_mask", torch.ones_like(ids)).sum(1).tolist()
        found += [
            (tuple(ids[row, :length].tolist()), tuple(labels[row, :length].tolist()))
            for row, length in enumerate(lengths)
        ]
    return found


@pytest.fixture(params=["clm", "mlm", "mlm whole words", "mlm lines", "clm fitted"])
def config(request: pytest.FixtureRequest, corpus: Path, make_config: MakeConfig) -> RunConfig:
    kind = request.param
    if kind == "mlm lines":
        for path in corpus.iterdir():
            path.write_text(path.read_text().replace(". ", ".\n"))
    return make_config(
        mlm="mlm" in kind,
        objective={"whole_word": True} if "words" in kind else {},
        data={
            "line_by_line": "lines" in kind,
            "packing": "best_fit" if "fitted" in kind else "concatenate",
        },
    )


@pytest.fixture
def prepared(config: RunConfig, run_dir: Path) -> Prepared:
    return prepare(config, run_dir)


def test_a_step_is_the_same_for_every_world_size(config: RunConfig, prepared: Prepared) -> None:
    alone = rows(train_loader(prepared, config, rank=0, layout=RankLayout(), total_steps=3))
    for world_size in (2, 4):
        loaders = [
            list(
                train_loader(
                    prepared, config, rank=r, layout=RankLayout(replicas=world_size), total_steps=3
                )
            )
            for r in range(world_size)
        ]
        accumulation = 4 // world_size
        for step in range(3):
            inside = slice(step * accumulation, (step + 1) * accumulation)
            together = [row for loader in loaders for row in rows(loader[inside])]
            assert sorted(together) == sorted(alone[16 * step : 16 * step + 16])


def test_training_goes_on_where_it_stopped(config: RunConfig, prepared: Prepared) -> None:
    def steps(count: int, start: int = 0) -> list[object]:
        loader = train_loader(
            prepared,
            config,
            rank=1,
            layout=RankLayout(shards=2),
            start_sample=start,
            total_steps=count,
        )
        assert len(loader) == 2 * count
        return list(rows(loader))

    epochs = 2 * prepared.samples_per_epoch // 16 + 3
    assert steps(epochs)[8 * (epochs - 2) :] == steps(2, start=16 * (epochs - 2))


def test_workers_change_nothing(
    prepared: Prepared, config: RunConfig, make_config: MakeConfig
) -> None:
    trainer = config.trainer.model_copy(update={"dataloader_workers": 2})
    with_workers = config.model_copy(update={"trainer": trainer})
    one, two = (
        rows(train_loader(prepared, c, rank=0, layout=RankLayout(), total_steps=2))
        for c in (config, with_workers)
    )
    assert one == two


def test_two_processes_load_beside_a_gpu_unless_told_otherwise(config: RunConfig) -> None:
    def asked(device: str, **trainer: object) -> int:
        launcher = config.launcher.model_copy(update={"device": device})
        fields = config.trainer.model_copy(update=trainer)
        return workers(config.model_copy(update={"launcher": launcher, "trainer": fields}))

    assert (asked("cuda"), asked("cpu")) == (2, 0)
    assert asked("cuda", dataloader_workers=0) == 0
    assert asked("cpu", dataloader_workers=3) == 3


def test_loading_leaves_torchs_random_state_alone(config: RunConfig, prepared: Prepared) -> None:
    before = torch.get_rng_state()
    list(train_loader(prepared, config, rank=0, layout=RankLayout(), total_steps=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("limit", [None, 7])
def test_evaluation_sees_each_held_out_sample_once(
    config: RunConfig, prepared: Prepared, limit: int | None
) -> None:
    trainer = config.trainer.model_copy(
        update={"eval_max_samples": limit, "eval_micro_batch_size": 3}
    )
    config = config.model_copy(update={"trainer": trainer})
    alone = Counter(rows(eval_loader(prepared, config, rank=0, layout=RankLayout())))
    for world_size in (1, 2, 4):
        loaders = [
            list(eval_loader(prepared, config, rank=r, layout=RankLayout(replicas=world_size)))
            for r in range(world_size)
        ]
        assert len({len(loader) for loader in loaders}) == 1
        values = [value for loader in loaders for batch in loader for value in batch.values()]
        shapes = {value.shape for value in values if isinstance(value, torch.Tensor)}
        if not config.data.line_by_line:
            assert shapes == {(3, config.data.sequence_length)}
        assert {rows for rows, _ in shapes} == {3}
        counted = Counter(
            row for loader in loaders for row in rows(loader) if set(row[1]) != {-100}
        )
        assert counted == Counter({k: n for k, n in alone.items() if set(k[1]) != {-100}})
        slots = sum(len(loader) for loader in loaders) * 3
        samples = limit or prepared.eval_samples
        assert 0 <= slots - samples < 3 * world_size


def test_evaluation_masks_alike_for_every_seed(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    evaluations = []
    trainings = []
    for seed in (0, 1):
        config = make_config(mlm=True, seed=seed)
        prepared = prepare(config, run_dir)
        evaluations.append(rows(eval_loader(prepared, config, rank=0, layout=RankLayout())))
        trainings.append(
            rows(train_loader(prepared, config, rank=0, layout=RankLayout(), total_steps=1))
        )
    assert evaluations[0] == evaluations[1]
    assert trainings[0] != trainings[1]


def test_an_epoch_of_clm_is_the_text(corpus: Path, make_config: MakeConfig, run_dir: Path) -> None:
    config = make_config(data={"eval_fraction": 0.0})
    prepared = prepare(config, run_dir)
    stream = "</s>".join(path.read_text() for path in sorted(corpus.iterdir())) + "</s>"
    steps = -(-prepared.samples_per_epoch // 16)
    loader = train_loader(prepared, config, rank=0, layout=RankLayout(), total_steps=steps)
    texts = {str(prepared.tokenizer.decode(list(labels))) for _, labels in rows(loader)}
    assert len(texts) > 0.9 * prepared.samples_per_epoch
    assert all(text in stream for text in texts)


def test_no_held_out_samples_make_no_batches(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(data={"eval_fraction": 0.0})
    assert (
        list(eval_loader(prepare(config, run_dir), config, rank=0, layout=RankLayout(shards=2)))
        == []
    )


def test_random_tokens_are_none_of_the_holes_among_the_ids(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    vocabulary = {"<unk>": 0, "[SEP]": 1, "[MASK]": 2, "pure": 100, "reason": 299}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(tmp_path / "holes")
    (tmp_path / "a.txt").write_text("pure reason " * 2000)
    config = make_config(
        mlm=True,
        data={"paths": [str(tmp_path / "a.txt")], "eval_fraction": 0.0},
        tokenizer={"kind": "pretrained", "name": str(tmp_path / "holes")},
        objective={"random_token_share": 0.5, "mask_token_share": 0.5, "masking_rate": 0.9},
    )
    prepared = prepare(config, run_dir)
    loader = train_loader(prepared, config, rank=0, layout=RankLayout(), total_steps=4)
    assert {i for ids, _ in rows(loader) for i in ids} == {1, 2, 100, 299}
