"""Tensors that lie in pieces, to be read lazily."""

from __future__ import annotations

from pathlib import Path

import torch

from shardwright.train.checkpoint.format.lazy import Fragment, LazyTensor


def in_fragments(tensor: torch.Tensor, directory: Path, cuts: list[int]) -> LazyTensor:
    """Lay a tensor into a file for each fragment, with other bytes before and after."""
    flat, fragments = tensor.flatten(), []
    for start, stop in zip([0, *cuts], [*cuts, tensor.numel()], strict=True):
        path = directory / f"part-{start}"
        data = flat[start:stop].contiguous().view(torch.uint8).numpy().tobytes()
        path.write_bytes(b"before " + data + b" after")
        fragments.append(Fragment(path, len(b"before "), start, stop - start))
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tuple(fragments))
