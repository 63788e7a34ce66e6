"""What tells a model where documents begin and end: positions, and what its kernel wants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.config import documents
from shardwright.train.model.documents import DocumentBounds

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=12)


def told(form: Any, lengths: list[int], **settings: Any) -> dict[str, Any]:
    return DocumentBounds(form, 70, **settings).of(np.array(lengths), (1, sum(lengths)))


def test_positions_begin_anew_with_each_document() -> None:
    bounds = DocumentBounds("bounds", longest=8, first_position=2)
    found = bounds.of(np.array([3, 1, 4]), (2, 4))
    assert found["position_ids"].tolist() == [[2, 3, 4, 2], [2, 3, 4, 5]]
    assert found["document_bounds"].tolist() == [0, 3, 4, 8]
    assert found["document_bounds"].dtype == torch.int32
    assert found["longest_document"] == 8


def test_each_token_has_the_number_of_its_document() -> None:
    found = DocumentBounds("numbers", 8).of(np.array([3, 1, 4]), (2, 4))
    assert found["document_numbers"].tolist() == [[0, 0, 0, 1], [2, 2, 2, 2]]


@given(LENGTHS, st.booleans())
def test_each_token_has_a_slot_among_those_of_its_document(
    lengths: list[int], one_group: bool
) -> None:
    found = told("slots", lengths, one_group=one_group)
    slots, places = found["document_slots"], found["document_places"]
    assert slots[places].tolist() == list(range(sum(lengths)))
    is_token = torch.cat([group.flatten() for group in found["document_groups"]])
    assert is_token[places].all()
    assert int(is_token.sum()) == len(places) == sum(lengths)
    of_rows = [row for group in found["document_groups"] for row in group]
    assert sorted(int(row.sum()) for row in of_rows) == sorted(lengths)
    begin = 0
    number = np.repeat(np.arange(len(lengths)), lengths)
    for row in of_rows:
        tokens = slots[begin : begin + len(row)]
        assert len(np.unique(number[tokens.numpy()])) == 1, "a row is one document"
        assert (tokens[row].diff() == 1).all(), "in its order, padded at its end"
        begin += len(row)


@given(LENGTHS)
def test_a_group_holds_no_document_of_less_than_half_its_longest(lengths: list[int]) -> None:
    for group in told("slots", lengths)["document_groups"]:
        assert group.shape[1] <= 16 or int(group.sum(1).min()) > group.shape[1] // 2
    assert len(told("slots", lengths, one_group=True)["document_groups"]) == 1


@pytest.mark.parametrize(
    ("attention", "on_gpu", "in_16_bits", "dropout", "has", "kernel"),
    [
        ("auto", False, False, 0.0, "varlen flash", "sdpa"),
        ("auto", True, True, 0.0, "varlen flash", "varlen"),
        ("auto", True, False, 0.0, "varlen flash", "sdpa"),
        ("auto", True, True, 0.1, "varlen", "sdpa"),
        ("auto", True, True, 0.1, "varlen flash", "flash_attention_2"),
        ("auto", True, True, 0.0, "flash", "flash_attention_2"),
        ("auto", True, True, 0.0, "", "sdpa"),
        ("sdpa", True, True, 0.0, "varlen flash", "sdpa"),
        ("eager", True, True, 0.0, "varlen flash", "eager"),
        ("flash_attention_2", True, True, 0.1, "varlen flash", "flash_attention_2"),
    ],
)
def test_which_kernel_attends(
    attention: str, on_gpu: bool, in_16_bits: bool, dropout: float, has: str, kernel: str
) -> None:
    found = documents.kernel(
        attention,
        on_gpu=on_gpu,
        in_16_bits=in_16_bits,
        dropout=dropout,
        has_varlen="varlen" in has,
        has_flash_attn="flash" in has,
    )
    assert found == kernel


@pytest.mark.parametrize(
    ("config_json", "dropout"),
    [
        ({"attention_probs_dropout_prob": 0.1}, 0.1),
        ({"attn_pdrop": 0.2}, 0.2),
        ({"attention_dropout": 0}, 0.0),
        ({}, 0.0),
    ],
)
def test_dropout_on_attention_weights_has_several_names(
    config_json: dict[str, float], dropout: float
) -> None:
    assert documents.attention_dropout(config_json) == dropout
