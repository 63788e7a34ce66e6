"""A masked model whose head sees labels alone learns what one learns whose head sees everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwright.train.errors import UserError
from shardwright.train.loop.trainer import IGNORED, Trainer
from shardwright.train.model.labelled_head import LabelledHead, positions_of
from tests.unit.heads import MASKED, ids_and_labels


@pytest.mark.parametrize("kind", MASKED)
def test_loss_and_gradients_are_those_of_the_whole_head(kind: str) -> None:
    torch.manual_seed(0)
    model = MASKED[kind]().eval()
    ids, labels = ids_and_labels(IGNORED, 0.2)
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
    model = MASKED["roberta"]()
    ids, labels = ids_and_labels(IGNORED, 0.0)
    positions = positions_of(labels, IGNORED)
    with LabelledHead(model).at(positions):
        outputs = model(input_ids=ids)
    Trainer.loss(outputs, labels.flatten()[positions], torch.tensor(7)).backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.get_input_embeddings().weight.grad is not None


def test_a_model_whose_head_cannot_be_divided_is_told_so() -> None:
    model = MASKED["roberta"]()
    with pytest.raises(
        UserError,
        match=r"head gives logits of shape \(3, 16, 96\) for 4 positions: .* set "
        "objective.head_on_labels_only=false",
    ):
        LabelledHead(model).check(torch.empty(3, 16, 96), torch.arange(4))
