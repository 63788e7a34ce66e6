"""What a label weighs depends neither on accumulation nor on the number of ranks."""

from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from train.trainer import IGNORED, Trainer


def test_parts_of_a_batch_add_up_to_the_mean_of_the_whole() -> None:
    logits = torch.randn(4, 6, 11)
    labels = torch.randint(0, 11, (4, 6))
    labels[0, :5] = IGNORED  # micro-batches hold different numbers of labels
    whole = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    count = labels.ne(IGNORED).sum()
    parts = [
        Trainer.loss(SimpleNamespace(logits=logits[rows]), labels[rows], count)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_batch_without_labels_costs_nothing_and_divides_by_nothing() -> None:
    outputs = SimpleNamespace(logits=torch.randn(1, 3, 5, requires_grad=True))
    loss = Trainer.loss(outputs, torch.full((1, 3), IGNORED), torch.tensor(1))
    assert loss.item() == 0
