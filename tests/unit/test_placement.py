"""Weights go to the device on which they stay one by one: never all of them by way of the host.

The device here is meta. Tensors that pretend to be on a GPU cannot be copied to by a torch without
CUDA (2.13).
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.train.model.first_values import materialize
from shardwright.train.model.weights import Zeros, initialized


class HostBytes(TorchDispatchMode):
    """Follows how many bytes lie in host memory at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if not hasattr(storage, "followed"):
                    storage.followed = True  # type: ignore[attr-defined]
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize("kind", ["drawn", "later"])
def test_the_host_holds_one_weight_at_a_time(kind: str) -> None:
    config = GPT2Config(vocab_size=512, n_embd=256, n_layer=8, n_head=2, n_positions=64)
    model, values = initialized(lambda: GPT2LMHeadModel(config), seed=1)
    if kind == "later":  # what the engine takes with its master weights
        values = {name: Zeros() for name in values}
    sizes = [p.numel() * 4 for p in model.parameters()]
    with HostBytes() as host:
        materialize(model, values, torch.bfloat16, "meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert max(sizes) <= host.most <= 2 * max(sizes) < sum(sizes) / 4
