"""A masked model whose head sees labels alone learns what one learns whose head sees everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.errors import UserError
from shardwright.train.loop.trainer import IGNORED, Trainer
from shardwright.train.model.labelled_head import LabelledHead, positions_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DISTIL = DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "roberta, untied": lambda: RobertaForMaskedLM(
        RobertaConfig(**SIZES, tie_word_embeddings=False)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, pad_token_id=0)),
    "distilbert": lambda: DistilBertForMaskedLM(DISTIL),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SIZES)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES)),
}


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 96, (3, 16))
    labels = torch.where(torch.rand(3, 16) < 0.2, ids, IGNORED)
    labels[1] = IGNORED  # a short sample may have none
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_head(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    ids, labels = batch().values()
    whole = Trainer.loss(model(input_ids=ids), labels)
    whole.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    rows: list[int] = []
    embedding: Any = model.get_output_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    head, positions = LabelledHead(model), positions_of(labels, IGNORED)
    with head.at(positions):
        outputs = model(input_ids=ids)
    head.check(outputs.logits, positions)
    loss = Trainer.loss(outputs, labels.flatten()[positions])
    loss.backward()

    assert rows == [len(positions)] == [int(labels.ne(IGNORED).sum())]
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5)
    assert all(
        torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-5)
        for name, gradient in expected.items()
    )
    assert model(input_ids=ids).logits.shape == (3, 16, 96), "outside of the block all are there"


def test_a_batch_without_a_label_gives_no_gradient_and_no_error() -> None:
    model = MODELS["roberta"]()
    labels = torch.full((3, 16), IGNORED)
    positions = positions_of(labels, IGNORED)
    with LabelledHead(model).at(positions):
        outputs = model(input_ids=batch()["input_ids"])
    Trainer.loss(outputs, labels.flatten()[positions], torch.tensor(7)).backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.get_input_embeddings().weight.grad is not None


def test_a_model_whose_head_cannot_be_divided_is_told_so() -> None:
    model = MODELS["roberta"]()
    with pytest.raises(
        UserError,
        match=r"head gives logits of shape \(3, 16, 96\) for 4 positions: .* set "
        "objective.head_on_labels_only=false",
    ):
        LabelledHead(model).check(torch.empty(3, 16, 96), torch.arange(4))
