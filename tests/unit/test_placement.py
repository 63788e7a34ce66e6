"""Weights go to the device on which they stay one by one: never all of them by way of the host.

The device here is meta. Tensors that pretend to be on a GPU cannot be copied to by a torch without
CUDA (2.13).
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.train.model import quantised
from shardwright.train.model.first_values import materialize
from shardwright.train.model.weights import Zeros, initialized
from shardwright.train.strategy import engine_of
from tests.unit.strategy.configs import config


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


@pytest.mark.parametrize(
    "strategy", [{"kind": "ddp"}, *({"kind": "zero", "stage": stage} for stage in (0, 1, 2))]
)
def test_engines_that_hold_all_weights_put_them_on_their_device_in_its_dtype(
    strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = mock.Mock()
    monkeypatch.setattr(quantised, "materialize", given)
    wanted = config(strategy=strategy, precision={"compute_dtype": "bf16"})
    wanted.launcher.__dict__["device"] = "cuda"
    engine_of(wanted, 4).shard(torch.nn.Linear(1, 1), {})  # type: ignore[arg-type]
    # The parameters of DDP are its master weights.
    dtype = torch.float32 if strategy["kind"] == "ddp" else torch.bfloat16
    assert given.call_args.args[2:] == (dtype, "cuda")


@pytest.mark.parametrize("kind", ["drawn", "later"])
def test_the_host_holds_one_weight_at_a_time(kind: str) -> None:
    sizes = GPT2Config(vocab_size=512, n_embd=256, n_layer=8, n_head=2, n_positions=64)
    model, values = initialized(lambda: GPT2LMHeadModel(sizes), seed=1)
    if kind == "later":  # what the engine takes with its master weights
        values = {name: Zeros() for name in values}
    weights = [p.numel() * 4 for p in model.parameters()]
    with HostBytes() as host:
        materialize(model, values, torch.bfloat16, "meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert max(weights) <= host.most <= 2 * max(weights) < sum(weights) / 4
