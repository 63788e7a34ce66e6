"""What a label weighs depends neither on accumulation nor on the number of ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from shardwright.train.errors import UserError
from shardwright.train.loop.trainer import IGNORED, Trainer
from shardwright.train.model.build import ROUTER_LOGITS, auxiliary_coefficient
from shardwright.train.model.loss_terms import EQUAL, NONE


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


@pytest.mark.parametrize("coefficient", [0.5, 10.0])
def test_an_auxiliary_loss_counts_by_the_share_of_labels_and_is_no_label_loss(
    coefficient: float,
) -> None:
    logits = torch.randn(4, 6, 11)
    labels = torch.randint(0, 11, (4, 6))
    labels[0, :5] = IGNORED
    count = labels.ne(IGNORED).sum()
    # Of two micro-batches, with 1 and 18 of the 19 labels.
    parts = (slice(0, 1), torch.tensor(3.0)), (slice(1, 4), torch.tensor(2.0))
    trainer: Any = SimpleNamespace(
        loss=Trainer.loss,
        auxiliary_loss=torch.zeros(()),
        _auxiliary_coefficient=coefficient,
        _terms=NONE,
        _weighting=EQUAL,
        _own_loss=None,
        _check_head=lambda logits, labels: None,
    )
    total = label_loss = torch.zeros(())
    for rows, auxiliary in parts:
        outputs = SimpleNamespace(logits=logits[rows], aux_loss=auxiliary)
        total = total + Trainer._step_loss(trainer, outputs, labels[rows], count)
        label_loss = label_loss + trainer._label_loss
    plain = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    mean = (1 * 3.0 + 18 * 2.0) / 19
    torch.testing.assert_close(label_loss, plain)
    torch.testing.assert_close(trainer.auxiliary_loss, torch.tensor(mean))
    torch.testing.assert_close(total, plain + coefficient * mean)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("name", "settings", "coefficient"),
    [
        ("Mixtral", {"num_key_value_heads": 2, "router_aux_loss_coef": 0.25}, 0.25),
        ("Mixtral", {"num_key_value_heads": 2, "router_aux_loss_coef": 0.0}, 0.0),
        ("GraniteMoe", {"num_key_value_heads": 2, "router_aux_loss_coef": 0.25}, 0.25),
        ("JetMoe", {"num_key_value_heads": 1, "kv_channels": 16, "aux_loss_coef": 0.25}, 0.25),
        ("Llama", {}, 0.0),
    ],
)
def test_a_model_gives_the_auxiliary_loss_that_its_config_asks_for(
    name: str, settings: dict[str, Any], coefficient: float
) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert auxiliary_coefficient(model) == coefficient
    if coefficient:
        outputs = model(torch.arange(16).view(2, 8), use_cache=False, **{ROUTER_LOGITS: True})
        assert outputs.aux_loss.requires_grad
        assert outputs.aux_loss.item() >= 1.99  # the experts that a token takes, if equally busy


def test_one_that_does_not_is_refused() -> None:
    settings: dict[str, Any] = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size_mlp": 32,
    }
    config = transformers.Llama4TextConfig(**settings)
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(UserError, match=r"llama4_text\) requires an auxiliary loss by router_aux_"):
        auxiliary_coefficient(model)
    config.router_aux_loss_coef = 0.0
    assert auxiliary_coefficient(model) == 0.0
