"""How a process computes: what it is told is so by every name that libraries have for it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from shardwright.train.errors import UserError
from shardwright.train.process import inherited, numerics
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


# --- kernels that repeat ----------------------------------------------------------------------


def test_kernels_repeat_inside_of_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(inherited.CUBLAS, raising=False)
    monkeypatch.setenv(inherited.FLASH_ATTENTION, "")
    benchmark = torch.backends.cudnn.benchmark
    with numerics.kernels(deterministic=False):
        assert numerics.deterministic_parts() == []
    with numerics.kernels(deterministic=True):
        assert numerics.deterministic_parts() == list(numerics.DETERMINISTIC)
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (
        False,
        benchmark,
    )
    assert inherited.CUBLAS not in os.environ
    assert os.environ[inherited.FLASH_ATTENTION] == ""
    torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))
    assert numerics.refused(raised.value) == (
        f"trainer.deterministic=true: torch {torch.__version__} has no deterministic kernel for "
        "put_, which this run calls; set trainer.deterministic=false, or choose another model, "
        "model.attention or trainer.optimizer"
    )
    assert numerics.refused(RuntimeError("CUDA error: an illegal memory access")) is None


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (lambda: torch.use_deterministic_algorithms(True, warn_only=True), "algorithms"),
        (lambda: os.environ.update(CUBLAS_WORKSPACE_CONFIG=":0:0"), "cublas"),
        (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cudnn"),
        (lambda: os.environ.pop(inherited.FLASH_ATTENTION), "flash_attention_2"),
    ],
)
def test_what_is_switched_back_is_read_back(spoil: Callable[[], object], left: str) -> None:
    with numerics.kernels(deterministic=True):
        spoil()
        found = numerics.deterministic_parts()
        os.environ.update(inherited.of_determinism({}))  # for the block's end
    assert set(numerics.DETERMINISTIC) - set(found) == {left}


def test_an_environment_that_contradicts_kernels_that_repeat_is_refused() -> None:
    for name, value in ((inherited.CUBLAS, ":0:0"), (inherited.FLASH_ATTENTION, "0")):
        with pytest.raises(
            UserError, match=f"{name}={value} in the environment contradicts .*; unset it"
        ):
            inherited.of_determinism({name: value})
    asked = {inherited.CUBLAS: ":16:8"}
    assert inherited.of_determinism(asked) == {**asked, inherited.FLASH_ATTENTION: "1"}
    assert inherited.of_determinism({}) == {
        inherited.CUBLAS: ":4096:8",
        inherited.FLASH_ATTENTION: "1",
    }
