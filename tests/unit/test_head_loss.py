"""A head that gives the loss in pieces learns what one that gives logits does, and holds none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from shardwright.train.errors import UserError
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import head_loss
from shardwright.train.model.build import fitted
from shardwright.train.model.head_loss import (
    HeadLoss,
    is_in,
    loss_and_right,
    rows_of_a_piece,
    summed_loss,
    why_not,
)
from shardwright.train.model.labelled_head import LabelledHead, positions_of
from shardwright.train.model.loss_terms import IGNORED, NONE, LossTerms, summed
from tests.unit.heads import CAUSAL, GPT2, MASKED, SIZES, VOCABULARY, ids_and_labels
from tests.unit.optimizers import config


@pytest.fixture(autouse=True)
def _pieces_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test need several pieces, and the last one be a smaller one."""
    monkeypatch.setattr(head_loss, "rows_of_a_piece", lambda positions, features: 7)


# --- models --------------------------------------------------------------------------------------


def plain_and_fused(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, *, on_labels_only: bool = False
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the loss and the gradients of a model, of its logits and of its head's own loss."""
    found = []
    count = torch.tensor(9)  # labels of the step, of which these are a part

    def note(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))

    note(Trainer.loss(model(input_ids=ids), labels, count))
    positions = positions_of(labels, IGNORED)
    asked = labels.flatten()[positions] if on_labels_only else labels.flatten()
    head, labelled = HeadLoss(model), LabelledHead(model)
    with head.of(asked):
        if on_labels_only:
            with labelled.at(positions):
                outputs = model(input_ids=ids)
        else:
            outputs = model(input_ids=ids)
        head.check(outputs.logits)
    assert outputs.logits.shape == ()
    assert outputs.logits.dtype == torch.float32
    note(Trainer.loss(outputs, asked, count))
    assert model(input_ids=ids).logits.shape == (3, 16, VOCABULARY), "outside of the block"
    return found


@pytest.mark.parametrize("on_labels_only", [False, True])
@pytest.mark.parametrize("kind", [*CAUSAL, *MASKED])
def test_loss_and_gradients_are_those_of_the_logits(kind: str, on_labels_only: bool) -> None:
    torch.manual_seed(0)
    model = {**CAUSAL, **MASKED}[kind]().eval()
    ids, labels = ids_and_labels(IGNORED, 0.2 if on_labels_only else 0.9)
    plain, fused = plain_and_fused(model, ids, labels, on_labels_only=on_labels_only)
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    assert fused[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(fused[1][name], gradient, atol=4e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_under_autocast_the_products_are_of_bf16_and_the_loss_of_fp32(kind: str) -> None:
    torch.manual_seed(0)
    model = {**CAUSAL, **MASKED}[kind]().eval()
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused = plain_and_fused(model, *ids_and_labels(IGNORED, 0.9))
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    for name, gradient in plain[1].items():
        assert fused[1][name].dtype == torch.float32
        error = (fused[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error < 2e-2, name


def test_a_batch_without_a_label_gives_no_gradient_and_no_error() -> None:
    for on_labels_only in (False, True):
        ids, labels = ids_and_labels(IGNORED, 0.0)
        _, (loss, gradients) = plain_and_fused(
            MASKED["roberta"](), ids, labels, on_labels_only=on_labels_only
        )
        assert loss == 0
        assert "lm_head.bias" in gradients
        assert not any(gradient.any() for gradient in gradients.values())


def test_a_model_is_freed_with_its_head() -> None:
    model = CAUSAL["gpt2"]()
    head, kept = weakref.ref(model.get_output_embeddings()), HeadLoss(model)
    gc.disable()
    try:
        del model
        assert head() is None
    finally:
        gc.enable()
    del kept


# --- which models can ----------------------------------------------------------------------------

WITH_KEYS = {**SIZES, "num_key_value_heads": 2}
CHANGING: dict[str, dict[str, Any]] = {
    "Gemma2": {**WITH_KEYS, "head_dim": 16},
    "Cohere": WITH_KEYS,
    "Granite": {**WITH_KEYS, "logits_scaling": 2.0},
}
EXPERTS = {**WITH_KEYS, "num_local_experts": 4, "num_experts_per_tok": 2}
CHANGED = "it computes its logits from what its output embedding gives"


def on_meta(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        found: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**settings)
        )
    return found


@pytest.mark.parametrize("kind", [*CAUSAL, *MASKED])
def test_it_is_found_without_values_that_a_model_can(kind: str) -> None:
    with torch.device("meta"):
        model = {**CAUSAL, **MASKED}[kind]().train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert why_not(model) is None
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not is_in(model)
    HeadLoss(model)
    assert is_in(model)


def test_a_body_that_cannot_run_without_values_is_left_out() -> None:
    assert why_not(on_meta("Mixtral", EXPERTS)) is None


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_that_changes_its_logits_has_the_plain_loss(name: str) -> None:
    model = on_meta(name, CHANGING[name])
    assert why_not(model) == CHANGED
    for wanted in ("auto", False):
        found = fitted(config(fused_loss=wanted), model)
        assert found.trainer.fused_loss is False
    with pytest.raises(UserError, match=rf"^trainer.fused_loss=true is impossible .*: {CHANGED}; "):
        fitted(config(fused_loss=True), model)
    sound = on_meta("Llama", WITH_KEYS)
    for wanted, expected in (("auto", True), (True, True), (False, False)):
        assert fitted(config(fused_loss=wanted), sound).trainer.fused_loss is expected


def test_why_a_model_cannot_is_said() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    model: Any = CAUSAL["gpt2"]()
    model.lm_head = Scaled(32, VOCABULARY)
    assert why_not(model) == "its output embedding is no linear layer (Scaled)"
    model = CAUSAL["gpt2"]()
    model.lm_head = nn.Linear(32, VOCABULARY)
    sound = model.forward

    def without_head(**inputs: Any) -> Any:
        return SimpleNamespace(logits=model.transformer(**inputs)[0] @ model.lm_head.weight.T)

    def broken(**inputs: Any) -> Any:
        raise KeyError("x")

    for forward, problem in (
        (without_head, "it does not call its output embedding"),
        (broken, "its forward pass could not be followed (KeyError: 'x')"),
        (sound, None),
    ):
        model.forward = forward
        assert why_not(model) == problem
    model.get_output_embeddings = lambda: None
    assert why_not(model) == "it has no output embedding"


@pytest.mark.parametrize(
    ("changed", "is_refused"),
    [
        (lambda logits: logits, False),
        (lambda logits: logits.detach(), False),  # DeepSpeed's hooks give a view
        (lambda logits: logits.float(), False),  # accelerate's
        (lambda logits: logits / 2, True),
        (lambda logits: logits.mul_(2), True),
        (lambda logits: logits[None], True),
    ],
)
def test_a_change_that_comes_with_training_alone_is_noticed(changed: Any, is_refused: bool) -> None:
    model = CAUSAL["gpt2"]()
    head = HeadLoss(model)
    ids, labels = ids_and_labels(IGNORED, 0.9)
    with torch.no_grad(), head.of(labels.flatten()):
        logits = changed(model(input_ids=ids).logits)
        if is_refused:
            with pytest.raises(UserError, match=CHANGED):
                head.check(logits)
        else:
            assert head.check(logits) is logits
    with head.of(labels.flatten()), pytest.raises(UserError, match="does not call"):
        head.check(logits)
    with head.of(labels.flatten()[:5]), pytest.raises(UserError, match="48 positions of 5 labels"):
        model(input_ids=ids)


# --- the loss of a linear layer ------------------------------------------------------------------


def layer(dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return hidden states, weight, bias and labels, of which some are to be left out."""
    torch.manual_seed(0)
    hidden = torch.randn(30, 16).to(dtype).requires_grad_()
    weight = (torch.randn(50, 16) / 4).to(dtype).requires_grad_()
    shift = torch.randn(50).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, 50, (30,))
    labels[::4] = IGNORED
    return hidden, weight, shift, labels


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    terms: LossTerms = NONE,
) -> Tensor:
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": terms.label_smoothing}
    loss = cross_entropy(logits, labels, reduction="sum", **options)
    norms = logits.logsumexp(-1)[labels != IGNORED]
    return loss + terms.z_loss * (norms**2).sum()


@pytest.mark.parametrize(
    "terms", [NONE, LossTerms(label_smoothing=0.2), LossTerms(z_loss=0.05), LossTerms(0.1, 0.02)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-13),
        (torch.float32, 1e-6),
        (torch.bfloat16, 8e-3),
        # Only scaled gradients do not vanish in it: unscaled, this would be 1e-2 and more.
        (torch.float16, 1e-3),
    ],
)
def test_gradients_are_as_exact_as_their_dtype(
    dtype: torch.dtype, tolerance: float, bias: bool, terms: LossTerms
) -> None:
    inputs = layer(dtype, bias=bias)
    leaves = [x for x in inputs[:3] if x is not None]
    scale = 2.0**9 if dtype == torch.float16 else 1.0
    losses = [function(*inputs, terms) for function in (plain, summed_loss)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert losses[1].dtype == torch.promote_types(dtype, torch.float32)
    expected, found = (torch.autograd.grad(loss * scale / 23, leaves) for loss in losses)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def weighted(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    terms: LossTerms,
    weights: Tensor,
) -> Tensor:
    """Return the plain loss of each label by itself, times its weight."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    smoothing = terms.label_smoothing
    total = torch.zeros((), dtype=logits.dtype)
    for row, label, own in zip(logits, labels, weights, strict=True):
        if label != IGNORED:
            loss = cross_entropy(row, label, label_smoothing=smoothing)
            total = total + own * (loss + terms.z_loss * row.logsumexp(-1) ** 2)
    return total


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("terms", [NONE, LossTerms(0.1, 0.02)])
def test_each_label_counts_by_its_weight(
    dtype: torch.dtype, tolerance: float, terms: LossTerms
) -> None:
    inputs = layer(dtype)
    leaves = [x for x in inputs[:3] if x is not None]
    weights = torch.linspace(1.0, 30.0, len(inputs[3]))
    scale = 2.0**6 if dtype == torch.float16 else 1.0
    losses = [function(*inputs, terms, weights) for function in (weighted, summed_loss)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    expected, found = (torch.autograd.grad(loss * scale / 23, leaves) for loss in losses)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()

    logits = linear(*inputs[:3])
    by_logits = summed(logits, inputs[3], terms, weights)
    assert by_logits.item() == pytest.approx(losses[0].item(), rel=1e-6)
    evaluated, right = loss_and_right(*inputs, weights)
    of_labels = weighted(*inputs, NONE, weights).item()
    assert evaluated.item() == pytest.approx(of_labels, rel=1e-6)
    assert right == loss_and_right(*inputs)[1], "weights change no prediction"


@pytest.mark.parametrize("terms", [LossTerms(label_smoothing=0.2), LossTerms(z_loss=0.05)])
def test_a_loss_of_logits_minimises_the_same(terms: LossTerms) -> None:
    hidden, weight, bias, labels = layer(torch.float32)
    found = summed(linear(hidden, weight, bias), labels, terms)
    torch.testing.assert_close(found, plain(hidden, weight, bias, labels, terms))
    assert abs(float(found) - float(plain(hidden, weight, bias, labels))) > 0.05


def test_predictions_are_counted_with_the_plain_loss() -> None:
    """What is evaluated is the cross entropy, whatever training minimises besides."""
    torch.manual_seed(0)
    model = CAUSAL["gpt2"]().eval()
    ids, labels = ids_and_labels(IGNORED, 0.5)
    head = HeadLoss(model, LossTerms(0.1, 0.1))
    with torch.no_grad():
        with head.of(labels.flatten(), counts=True):
            evaluated = head.check(model(input_ids=ids).logits)
        with head.of(labels.flatten()):
            trained = head.check(model(input_ids=ids).logits)
        logits = model(input_ids=ids).logits
    assert float(evaluated) == pytest.approx(float(summed(logits.flatten(0, 1), labels.flatten())))
    assert abs(float(trained) - float(evaluated)) > 0.1


def test_gradients_in_fp16_are_scaled_before_they_are_rounded() -> None:
    """As GradScaler means it: a probability of 1e-8 is nothing in fp16, unless it is scaled."""
    hidden = torch.ones(3, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(2, 4, dtype=torch.float16)
    weight[1] = -4.6  # the logits differ by 18.4
    loss = summed_loss(hidden, weight, None, torch.zeros(3, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss * 2.0**12, hidden)
    assert gradient.abs().min() > 1e-5


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(wanted: str) -> None:
    hidden, weight, bias, labels = layer(torch.float32)
    assert bias is not None
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    expected = torch.autograd.grad(plain(hidden, weight, bias, labels), leaves[wanted])
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    summed_loss(hidden, weight, bias, labels).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
    torch.testing.assert_close(leaves[wanted].grad, expected[0])


def test_a_second_backward_pass_is_an_error() -> None:
    loss = summed_loss(*layer(torch.float32))
    loss.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_what_is_not_finite_stays_so_and_what_is_ignored_does_not_matter() -> None:
    for value, check in ((torch.inf, Tensor.isinf), (torch.nan, Tensor.isnan)):
        hidden, weight, bias, labels = layer(torch.float32)
        assert bias is not None
        with torch.no_grad():
            bias[labels[1]] = -value  # of a token that is to be predicted
        assert check(summed_loss(hidden, weight, bias, labels))
        assert check(loss_and_right(hidden, weight, bias, labels)[0])
    hidden, weight, bias, labels = layer(torch.float32)
    assert bias is not None
    with torch.no_grad():
        bias[7] = -torch.inf
    labels[labels == 7] = IGNORED
    assert summed_loss(hidden, weight, bias, labels).isfinite()


def test_right_predictions_are_counted_where_there_are_labels() -> None:
    hidden, weight, bias, labels = layer(torch.float32)
    likely = linear(hidden, weight, bias).argmax(-1)
    labels[1:12] = likely[1:12]
    labels[5] = IGNORED
    loss, right = loss_and_right(hidden, weight, bias, labels)
    assert right == (likely.eq(labels) & labels.ne(IGNORED)).sum()
    assert right >= 10
    assert loss.item() == pytest.approx(plain(hidden, weight, bias, labels).item(), rel=1e-6)


# --- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@contextmanager
def real_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(head_loss, "rows_of_a_piece", rows_of_a_piece)
        yield


@pytest.mark.parametrize("counts", [False, True])
def test_there_are_never_all_logits(counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = transformers.GPT2Config(**{**GPT2.to_diff_dict(), "vocab_size": 4000})
    model = transformers.GPT2LMHeadModel(small)
    ids = torch.randint(0, 4000, (16, 64))
    labels = ids.flatten()
    with Largest() as plainly:
        loss = Trainer.loss(model(input_ids=ids), labels)
        if not counts:
            loss.backward()
    head = HeadLoss(model)
    with real_pieces(monkeypatch), head.of(labels, counts=counts), Largest() as fused:
        loss = model(input_ids=ids).logits
        if not counts:
            loss.backward()
    assert plainly.elements == 16 * 64 * 4000
    assert fused.elements == 64 * 4032  # a row is padded to a multiple of 64


@pytest.mark.parametrize(
    ("positions", "features", "rows"),
    [
        (1024, 768, 384),
        (8192, 4096, 2048),
        (2100, 200, 100),
        (100, 768, 100),
        (130, 32, 64),
        (1, 32, 1),
        (0, 32, 1),
    ],
)
def test_pieces_are_about_equal_and_no_larger_than_the_weight(
    positions: int, features: int, rows: int
) -> None:
    assert rows_of_a_piece(positions, features) == rows


class Products(TorchDispatchMode):
    """Notes from what multiples of elements the rows of tensors begin that products read or write.

    Those of one row, and of rows that lie in the other direction, begin where they begin.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strides: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            matrices = [
                t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 2
            ]
            self.strides |= {max(t.stride()) for t in matrices}
        return func(*args, **kwargs)


@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_of_logits_begin_at_multiples_that_products_like(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = (
        torch.randn(200, 64, requires_grad=True),
        torch.randn(1009, 64, requires_grad=True),
    )
    bias = torch.randn(1009, requires_grad=True) if has_bias else None
    labels = torch.randint(0, 1009, (200,))
    with real_pieces(monkeypatch), Products() as products:
        loss = summed_loss(hidden, weight, bias, labels)
    assert products.strides == {64, 1024}
    plain = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(plain, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
