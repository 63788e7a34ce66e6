"""How a process computes, by all of torch's names for it. Each test has a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.distributed.optimizers import needs_compiler


def run(program: str) -> str:
    """Return what a program has printed; its settings are those of its whole process."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


_READERS = """
    import torch
    from torch._dynamo.graph_region_tracker import get_global_state_key
    from torch._inductor.select_algorithm import create_precompile_key

    def readers():
        return {
            "matmul": lambda: torch.backends.cuda.matmul.fp32_precision,
            "older_matmul": lambda: torch.backends.cuda.matmul.allow_tf32,
            "oldest_matmul": torch.get_float32_matmul_precision,
            "cudnn": lambda: torch.backends.cudnn.allow_tf32,
            "compiler": lambda: create_precompile_key("mm", "", []).split(":")[-1],
            "dynamo": lambda: get_global_state_key() is not None,
        }
"""


@pytest.mark.parametrize("allowed", [True, False])
def test_every_name_of_tf32_says_the_same(allowed: bool) -> None:
    said = run(
        f"""{_READERS}
    import warnings
    from shardwright.train.process.numerics import set_tf32

    warnings.simplefilter("error")
    set_tf32(not {allowed})
    set_tf32({allowed})
    print([read() for read in readers().values()])
    """
    )
    new, old = ("tf32", "high") if allowed else ("ieee", "highest")
    assert said.strip() == str([new, allowed, old, allowed, old, True])


def test_what_transformers_sets_raises_where_older_names_are_read() -> None:
    """If it no longer does, `set_tf32` has nothing left to do but what transformers does."""
    said = run(
        f"""{_READERS}
    from transformers.utils.import_utils import enable_tf32

    enable_tf32(True)
    for name, read in readers().items():
        try:
            read()
        except RuntimeError as error:
            print(name)
    """
    )
    assert set(said.split()) == {"older_matmul", "oldest_matmul", "compiler", "dynamo"}


@needs_compiler
def test_a_model_is_compiled_with_tf32() -> None:
    said = run(
        f"""{_READERS}
    from shardwright.train.process.numerics import set_tf32

    set_tf32(True)
    # What has dynamo read the older name of it, as inductor does where it tunes on a GPU.
    torch._dynamo.config.use_graph_deduplication = True
    layer = torch.nn.Linear(64, 32)
    inputs = torch.ones(16, 64)
    out = torch.compile(layer)(inputs)
    out.sum().backward()
    print(torch.allclose(out, layer(inputs), atol=1e-5), layer.weight.grad is not None)
    print([read() for read in readers().values()])
    """
    )
    assert said.splitlines() == [
        "True True",
        str(["tf32", True, "high", True, "high", True]),
    ], said
