"""Of the documents in a row each is to a model what it is alone, by every kernel."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from transformers import AutoModelForMaskedLM, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardwright.train.config import documents, from_tree
from shardwright.train.errors import UserError
from shardwright.train.loop import isolation
from shardwright.train.model import activation_checkpointing, document_attention
from shardwright.train.model.compilation import compile_blocks
from shardwright.train.model.document_attention import PREFIX, enable, is_compiled
from shardwright.train.strategy.verify import EngineMismatch
from tests.distributed.optimizers import needs_compiler
from tests.documents import LENGTHS, SHAPE, alone, bounds, model_of, tokens, told
from tests.unit.trees import TREE


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads wait for each other at each operation, which takes longer than these models do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    """Compare to 1e-5 of the largest value: a float has about seven digits."""
    assert found[1].keys() == expected[1].keys()
    for mine, its in [(found[0], expected[0]), *((found[1][n], g) for n, g in expected[1].items())]:
        assert (mine - its).abs().max() <= 1e-5 * max(1.0, float(its.abs().max()))


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        *((kind, "sdpa") for kind in sorted(documents.MODELS)),
        *((kind, "eager") for kind in ("bert", "roberta", "modernbert", "gpt2", "llama")),
    ],
)
def test_a_document_among_others_is_what_it_is_alone(
    kind: str, kernel: documents.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    expected = alone(model)
    model.config._attn_implementation = "sdpa"
    together = model(tokens()).logits.detach().flatten(0, 1)
    assert (together - expected[0]).abs().max() > 0.1, "documents would make no difference"
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", pytest.fail)
    form = "slots" if kernel == "sdpa" else "numbers"
    assert_equal(told(model, kernel, bounds(kind, form)), expected)


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "gpt2", "llama"])
def test_all_lengths_together_are_what_lengths_apart_are(kind: str) -> None:
    model = model_of(kind)
    assert_equal(told(model, "sdpa", bounds(kind, "slots", one_group=True)), alone(model))


@pytest.mark.parametrize("parts", ["full", "selective"])
@pytest.mark.parametrize("kind", ["roberta", "modernbert", "gpt2", "llama"])
def test_recomputed_blocks_are_told_again(kind: str, parts: str) -> None:
    model = model_of(kind)
    expected = alone(model)
    activation_checkpointing.enable(model, 1, offload=False, parts=parts)
    assert_equal(told(model, "sdpa", bounds(kind, "slots")), expected)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_compiled_blocks_serve_documents_of_all_lengths(kind: str) -> None:
    model = model_of(kind)
    model.config._attn_implementation = PREFIX + "sdpa"
    tells = bounds(kind, "slots", one_group=True)
    divided = [(7, 1, 33, 7, 8, 40), (20, 28, 48), (48, 2, 3, 4, 39), (3,) * 32, (10, 38, 9, 39)]

    def logits(lengths: tuple[int, ...]) -> torch.Tensor:
        found: torch.Tensor = model(tokens(), **tells.of(np.array(lengths), SHAPE)).logits
        found.sum().backward()
        return found.detach()

    expected = [logits(lengths) for lengths in divided]
    compile_blocks(model)
    assert is_compiled(model)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        found = [logits(lengths) for lengths in divided]
    for mine, its in zip(found, expected, strict=True):
        assert (mine - its).abs().max() < 1e-4


def test_a_row_may_be_longer_than_the_model_has_positions() -> None:
    """As lines end to end are; each of them is not."""
    for kind in ("bert", "roberta", "gpt2"):
        model = model_of(kind)
        model.config._attn_implementation = PREFIX + "sdpa"
        arguments = bounds(kind, "slots").of(np.array(LENGTHS), (1, 96))
        logits = model(tokens().view(1, 96), **arguments).logits[0]
        assert (logits - alone(model)[0]).abs().max() < 1e-4


def test_padded_rows_are_what_lines_end_to_end_are() -> None:
    for kind in ("roberta", "modernbert", "llama"):
        model = model_of(kind)
        expected = alone(model)[0]
        lines = tokens().flatten().split(LENGTHS)
        padded = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=1)
        mask = torch.arange(padded.shape[1]) < torch.tensor(LENGTHS)[:, None]
        logits = model(padded, attention_mask=mask.long()).logits[mask]
        assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("kernel", "form"), [("sdpa", "slots"), ("eager", "numbers")])
@pytest.mark.parametrize(
    ("kind", "of_weights"), [("roberta", "self.dropout"), ("gpt2", "attn_dropout")]
)
def test_dropout_on_attention_weights_is_drawn_in_training_alone(
    kind: str, of_weights: str, kernel: documents.Kernel, form: str
) -> None:
    model = model_of(kind)
    without = told(model, kernel, bounds(kind, form))[0]
    for name, module in model.named_modules():
        if name.endswith(of_weights):
            module.p = 0.5
    assert (told(model, kernel, bounds(kind, form))[0] - without).abs().max() > 0.1
    model.eval()
    assert torch.equal(told(model, kernel, bounds(kind, form))[0], without)


def test_what_is_more_than_attention_within_documents_is_refused() -> None:
    model = model_of("llama")
    model.config._attn_implementation = PREFIX + "sdpa"
    arguments = bounds("llama", "slots").of(np.array(LENGTHS), SHAPE)
    with pytest.raises(
        UserError,
        match=r"LlamaAttention attends with softcap, which attention within documents does not "
        r"know; set data.document_attention=false",
    ):
        model(tokens(), **arguments, softcap=30.0)
    with pytest.raises(AssertionError, match="does not say where documents begin and end"):
        model(tokens())


def test_an_architecture_that_cannot_be_told_is_refused() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type="deberta-v2"))
    for by_line, field in ((False, "data.document_attention"), (True, "data.unpad")):
        data = {**TREE["data"], "line_by_line": by_line, "document_attention": True}
        with pytest.raises(
            UserError, match=rf"{field}=true, but it is not known how to tell deberta-v2 .*; set"
        ):
            enable(model, from_tree({**TREE, "data": data}))


def test_the_saved_config_loads_in_transformers_as_it_is(tmp_path: Path) -> None:
    model = model_of("roberta")
    model.config._attn_implementation = PREFIX + "sdpa"
    model.save_pretrained(tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def training(kind: str, *, by_line: bool = False) -> Any:
    """Return as much of a trainer as the proof needs, on one rank."""
    data = {**TREE["data"], "line_by_line": by_line, "document_attention": True}
    model = model_of(kind)
    model.config._attn_implementation = PREFIX + "sdpa"
    return SimpleNamespace(
        model=model,
        model_wrapped=model,
        config=from_tree({**TREE, "data": data}),
        engine=SimpleNamespace(after_evaluation=lambda trainer: None),
        _prepare_inputs=lambda batch: batch,
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2", "llama"])
def test_documents_are_proven_to_be_isolated(kind: str) -> None:
    trainer, state = training(kind), torch.get_rng_state()
    assert isolation.check(trainer) == {"seen_of_other_documents": 0.0}
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)
    trainer.model.config._attn_implementation = "sdpa"
    assert isolation.check(trainer) == {"seen_of_other_documents": None}


@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2"])
def test_a_leak_ends_the_run(kind: str, by_line: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, scaling=rest["scaling"]
        )

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PREFIX + "sdpa", leaky)
    field = "unpad" if by_line else "document_attention"
    with pytest.raises(
        EngineMismatch,
        match=rf"data.{field}=true is not what is running: where one document changes, others "
        r"change [0-9.e-]+ times as much \(sdpa attention of ",
    ):
        isolation.check(training(kind, by_line=by_line))


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    window: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Attend as flash attention's functions for rows of several lengths say that they do.

    A token sees ``window`` of those before it and after it, all of them where that is -1.
    """
    left, right = (10**6 if reach < 0 else reach for reach in window)
    found = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        at = torch.arange(end - begin)
        distance = at - at[:, None]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(
            (distance < -left) | (distance > right), -torch.inf
        )
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("version", ["2.13", "2.11", "flash_attn"])
@pytest.mark.parametrize("kind", ["roberta", "modernbert", "gpt2", "llama", "mistral"])
def test_kernels_of_gpus_are_asked_for_what_the_model_is(
    kind: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their arguments mean the same documents, heads, windows and direction."""

    def newer(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip # noqa: E501
        assert cu_q is cu_k
        assert max_q == max_k >= int(cu_q.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return by_hand(q, k, v, cu_q, window_size, scale)

    def older(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any = None, window_size: Any = (-1, -1)) -> torch.Tensor:  # fmt: skip # noqa: E501
        return newer(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    def flash(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **rest: Any) -> torch.Tensor:  # fmt: skip # noqa: E501
        left, right = rest["window_size"]
        assert rest["causal"] == (right == 0)
        return by_hand(q, k, v, cu_q, (left, right), rest["softmax_scale"])

    monkeypatch.setattr(varlen, "varlen_attn", newer if version == "2.13" else older)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    document_attention._knows_shared_keys.cache_clear()
    kernel: documents.Kernel = "flash_attention_2" if version == "flash_attn" else "varlen"
    model = model_of(kind)
    expected = alone(model)
    assert_equal(told(model, kernel, bounds(kind, "bounds")), expected)
    document_attention._knows_shared_keys.cache_clear()
