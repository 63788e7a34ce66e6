"""What is put away in host memory comes back whole, one ahead of its use, and is let go of."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shardwright.train.model.host_copies import HostCopies


class Written:
    """A stand-in for a stream: writes down what it is told, and that nothing is read too early."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.arrived: set[int] = set()

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        self.log.append(f"out {int(tensor.flatten()[0])}")
        return tensor.detach().clone()

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        value = int(host.flatten()[0])
        self.log.append(f"back {value}")
        return host.clone(), value

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        self.log.append(f"wait {arrival}")
        assert int(tensor.flatten()[0]) == arrival


def test_each_sets_out_while_the_one_behind_it_is_used() -> None:
    stream = Written()
    copies = HostCopies(lambda device: stream)
    away = [copies.put_away(torch.full((4,), float(n))) for n in range(3)]
    assert stream.log == ["out 0", "out 1", "out 2"]
    stream.log.clear()
    for n in (2, 1, 0):
        assert torch.equal(copies.take_back(away.pop()), torch.full((4,), float(n)))
        stream.log.append(f"use {n}")
    assert stream.log == [
        *("back 2", "wait 2", "back 1", "use 2"),
        *("wait 1", "back 0", "use 1"),
        *("wait 0", "use 0"),
    ]


def test_what_is_taken_twice_is_copied_twice_and_nothing_else_is() -> None:
    stream = Written()
    copies = HostCopies(lambda device: stream)
    first, second = (copies.put_away(torch.full((4,), float(n))) for n in range(2))
    one, again = copies.take_back(second), copies.take_back(second)
    assert torch.equal(one, again)
    assert one.data_ptr() != again.data_ptr()
    copies.take_back(first)
    assert [line for line in stream.log if line.startswith("back")] == [
        "back 1",
        "back 0",
        "back 1",
    ]


def test_a_pass_that_was_given_up_is_forgotten() -> None:
    stream = Written()
    copies = HostCopies(lambda device: stream)
    lost = [copies.put_away(torch.full((4,), float(n))) for n in range(3)]
    del lost
    gc.collect()
    kept = copies.put_away(torch.full((4,), 7.0))
    stream.log.clear()
    copies.take_back(kept)
    assert stream.log == ["back 7", "wait 7"]
    assert copies._away == []


def test_weights_and_indices_stay() -> None:
    copies = HostCopies(lambda device: Written())
    for tensor in (torch.nn.Parameter(torch.ones(2)), torch.arange(3)):
        assert copies.put_away(tensor) is tensor
        assert copies.take_back(tensor) is tensor


def test_a_backward_pass_by_them_is_the_same() -> None:
    stream = Written()
    copies = HostCopies(lambda device: stream)
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(4)]
    x = torch.randn(2, 4, requires_grad=True)

    def loss(offloads: bool) -> torch.Tensor:
        hidden: Any = x
        for weight in weights:

            def block(h: torch.Tensor, w: torch.Tensor = weight) -> torch.Tensor:
                return torch.tanh(h @ w)

            if not offloads:
                hidden = block(hidden)
                continue
            with copies.hooks():
                hidden = checkpoint(block, hidden, use_reentrant=False)
        return hidden.sum()

    loss(offloads=False).backward()
    expected = [w.grad for w in weights]
    for tensor in (*weights, x):
        tensor.grad = None
    copies_of_plain = HostCopies()
    for copies in (copies_of_plain, copies_of_plain):  # a second pass begins anew
        loss(offloads=True).backward()
        torch.testing.assert_close([w.grad for w in weights], expected)
        for tensor in (*weights, x):
            tensor.grad = None
        assert copies._newest() is None
