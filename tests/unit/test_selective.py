"""What is cheap is recomputed, what is dear is kept, and the gradients are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
)

from shardwright.train.model import activation_checkpointing, compilation, selective
from tests.distributed.optimizers import needs_compiler

TOKENS = torch.randint(5, 64, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0, "intermediate_size": 48}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def by(attention: str) -> dict[str, Any]:
    return {"attn_implementation": attention}


MODELS: dict[str, Any] = {
    "gpt2": lambda attention: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=2, use_cache=False,
                   **by(attention), resid_pdrop=0.1, attn_pdrop=0.1)
    ),
    "llama": lambda attention: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_dropout=0.1, use_cache=False, **by(attention))
    ),
    "modernbert": lambda attention: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, **IDS, mlp_dropout=0.1, **by(attention))
    ),
}  # fmt: skip


@pytest.fixture
def all_kept(monkeypatch: pytest.MonkeyPatch) -> list[selective.Kept]:
    """Return what is kept of each block, filled in as they run."""
    found: list[selective.Kept] = []

    class Watched(selective.Kept):
        def __init__(self) -> None:
            super().__init__()
            found.append(self)

    monkeypatch.setattr(selective, "Kept", Watched)
    return found


def trained(
    architecture: str, attention: str, parts: str | None, kept: list[selective.Kept]
) -> tuple[list[torch.Tensor | None], int]:
    """Return the gradients of a model, and the bytes that it keeps for its backward pass."""
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[architecture](attention).train()
    if parts is not None:
        activation_checkpointing.enable(model, 1, offload=False, parts=parts)
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.itemsize
        return tensor

    kept.clear()
    torch.manual_seed(1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    saved += sum(found.size_bytes for found in kept)
    loss.backward()
    return [p.grad for p in model.parameters()], saved


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_stay_and_memory_lies_between_none_and_full(
    architecture: str, attention: str, all_kept: list[selective.Kept]
) -> None:
    plain, most = trained(architecture, attention, None, all_kept)
    full, least = trained(architecture, attention, "full", all_kept)
    found, between = trained(architecture, attention, "selective", all_kept)
    assert len(all_kept) == 3
    torch.testing.assert_close(full, plain)
    torch.testing.assert_close(found, plain)
    assert least < between < most


def test_products_of_matrices_are_not_computed_again(all_kept: list[selective.Kept]) -> None:
    ran: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    def products_of(parts: str | None) -> int:
        ran.clear()
        with Watch():
            trained("llama", "sdpa", parts, all_kept)
        return sum(name in ("aten::mm", "aten::addmm") for name in ran)

    assert products_of("selective") == products_of(None) < products_of("full")


@pytest.mark.parametrize("operation", ["native_dropout"])
def test_dropout_behind_what_is_kept_and_draws_is_the_same(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention kernels of GPUs draw; here dropout stands in for one that is kept."""
    monkeypatch.setattr(selective, "_PRODUCTS", (f"aten::{operation}",))

    def gradient(recomputes: bool) -> torch.Tensor:
        torch.manual_seed(3)
        x = torch.ones(64, requires_grad=True)
        scale = torch.arange(64.0)

        def block(x: torch.Tensor) -> torch.Tensor:
            drawn = torch.native_dropout(x * scale, 0.5, True)[0]
            return (drawn.sin() * torch.rand(64)).exp()

        out: Any = (
            checkpoint(block, x, use_reentrant=False, context_fn=selective.contexts)
            if recomputes
            else block(x)
        )
        out.sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(recomputes=True), gradient(recomputes=False))


def test_what_hooks_do_besides_is_done_again() -> None:
    """Those of engines gather weights: with the second run they may do more, or less."""
    weight = torch.randn(4, 4, requires_grad=True)
    gathered: list[torch.Tensor] = []
    runs = iter(range(2))

    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(1 + 2 * next(runs)):
            gathered.append(torch.empty(3).fill_(1.0).narrow(0, 0, 2).clone())
        return (x @ weight).relu() @ weight

    x = torch.randn(2, 4, requires_grad=True)
    out: Any = checkpoint(block, x, use_reentrant=False, context_fn=selective.contexts)
    out.sum().backward()
    found, weight.grad = weight.grad, None
    ((x @ weight).relu() @ weight).sum().backward()
    torch.testing.assert_close(found, weight.grad)
    assert len(gathered) == 4


def once_more(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        _ = x @ weight
    return x


def test_a_block_that_is_not_the_same_again_is_an_error() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    runs: Iterator[int] = iter(range(2))

    def block(x: torch.Tensor) -> torch.Tensor:
        return ((once_more(x, weight) if next(runs) else x).exp() @ weight).sin()

    out: Any = checkpoint(block, x, use_reentrant=False, context_fn=selective.contexts)
    with pytest.raises(RuntimeError, match="aten::mm runs more often when a block is recomputed"):
        out.sum().backward()


def test_what_is_kept_of_a_block_and_changed_behind_it_is_an_error() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = x @ weight
        return product, product.exp() @ weight

    found: Any = checkpoint(block, x, use_reentrant=False, context_fn=selective.contexts)
    found[0].add_(1)
    message = "aten::mm gives in a block is changed in place behind it"
    with pytest.raises(RuntimeError, match=message):
        found[1].sum().backward()


class LinearOfZero3(torch.autograd.Function):
    """Adds the bias as DeepSpeed's linear layer does: where the product is, without its version."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        output = x.matmul(weight)
        output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        into_weight = x.flatten(0, 1).mT @ gradient.flatten(0, 1)
        return gradient @ weight.mT, into_weight, gradient.sum((0, 1))


@pytest.mark.parametrize(
    "linear",
    [LinearOfZero3.apply, lambda x, weight, bias: (x @ weight).add_(bias)],
    ids=["of ZeRO-3", "in place"],
)
def test_a_product_that_its_block_changes_is_kept_as_it_was(linear: Any) -> None:
    weight, bias = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    x = torch.randn(2, 3, 4, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = linear(linear(x, weight, bias).sin(), weight, bias).sin()
        return found

    gradients = []
    for context in (None, selective.contexts):
        options: dict[str, Any] = {} if context is None else {"context_fn": context}
        out: Any = checkpoint(block, x, use_reentrant=False, **options)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, weight, bias)))
    for plain, found in zip(*gradients, strict=True):
        assert torch.equal(plain, found)


@needs_compiler
@pytest.mark.slow
def test_compiled_blocks_recompute_their_cheap_parts() -> None:
    def gradients(parts: str | None) -> list[torch.Tensor | None]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MODELS["gpt2"]("sdpa").train()
        if parts is not None:
            activation_checkpointing.enable(model, 1, offload=False, parts=parts)
        before = compilation.found()
        compilation.compile_blocks(model)
        torch.manual_seed(1)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        made = compilation.found().since(before)
        assert (made.graphs, made.breaks) == (1, {})
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients("selective"), gradients(None))
