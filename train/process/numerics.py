"""How this process computes: TF32 in the products of fp32 or not, by kernels that repeat or not.

It imports torch, and what of it takes seconds, where that is needed only.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from shardwright.train.process import inherited

_REFUSED = "does not have a deterministic implementation"


def set_tf32(allowed: bool) -> None:
    """Let products of fp32 on a GPU run in TF32, or not, by every name that torch has for it.

    transformers (5.23, enable_tf32) sets the newest name alone. The older ones then contradict it,
    and torch (2.9 to 2.13, aten/Context.cpp) raises where they are read: its compiler does so
    (2.13 inductor/select_algorithm.py, create_precompile_key; earlier in compile_fx.py, too).
    """
    import torch

    with warnings.catch_warnings():
        # That they are older, which some versions say.
        warnings.filterwarnings("ignore", message=".*TF32")
        torch.backends.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def kernels(*, deterministic: bool) -> Iterator[None]:
    """Inside the block compute, where asked to, by kernels alone that give the same bits each time.

    To be entered before CUDA starts, as cuBLAS reads the environment. What has no such kernel
    raises (`refused`). Of attention, torch's flash and memory-efficient kernels then go another way
    back, and cuDNN's is not taken (2.13 aten/native/transformers, attention_backward.cu and
    sdp_utils.cpp); flash_attention_2 is told by its variable. torch.compile measures nothing on
    which its reductions depend. Memory that nothing has written to is filled with NaN, so that it
    would be seen if anything read it. Raises UserError where the environment contradicts it.
    """
    if not deterministic:
        yield
        return
    import torch
    from torch._inductor import config as inductor

    wanted = inherited.of_determinism(os.environ)
    before = {name: os.environ.get(name) for name in wanted}
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark, inductor.deterministic
    os.environ.update(wanted)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark, inductor.deterministic = True, False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark, inductor.deterministic = flags
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


DETERMINISTIC = ("algorithms", "cublas", "cudnn", "flash_attention_2", "inductor")
"""What all has to be, for kernels to repeat."""


def deterministic_parts() -> list[str]:
    """Return what of `DETERMINISTIC` is so here; nothing where torch is not told to be."""
    import torch

    if not torch.are_deterministic_algorithms_enabled():
        return []
    from torch._inductor import config as inductor

    cudnn = torch.backends.cudnn
    found = {
        "algorithms": not torch.is_deterministic_algorithms_warn_only_enabled(),
        "cublas": os.environ.get(inherited.CUBLAS) in inherited.CUBLAS_THAT_REPEATS,
        "cudnn": cudnn.deterministic and not cudnn.benchmark,
        "flash_attention_2": os.environ.get(inherited.FLASH_ATTENTION) == "1",
        "inductor": inductor.deterministic,
    }
    return [name for name in DETERMINISTIC if found[name]]


def refused(error: RuntimeError) -> str | None:
    """Return what torch has no kernel for that repeats, where an error is of that. Pure."""
    text = str(error)
    if _REFUSED not in text:
        return None
    import torch

    operation = text.partition(_REFUSED)[0].strip().splitlines()[-1]
    return (
        f"trainer.deterministic=true: torch {torch.__version__} has no deterministic kernel for "
        f"{operation}, which this run calls; set trainer.deterministic=false, or choose another "
        "model, model.attention or trainer.optimizer"
    )
