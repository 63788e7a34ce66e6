"""Whether blocks are compiled, and what is said of what has come of it."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.loop.callbacks.compilation import Compilation
from shardwright.train.model import compilation
from shardwright.train.model.compilation import Compiled
from tests.distributed.optimizers import needs_compiler
from tests.fixtures import TreeOf

TINY = GPT2Config(
    vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
)  # fmt: skip


@pytest.fixture
def config_of(tiny_tree: TreeOf, tmp_path: Path) -> Any:
    def config(device: str, strategy: dict[str, Any] | None = None, **trainer: Any) -> RunConfig:
        tree = tiny_tree("clm")
        tree["launcher"]["device"] = device
        tree["trainer"] |= trainer
        if strategy is not None:
            tree["strategy"] = strategy
        return from_tree({**tree, "run_dir": str(tmp_path)})

    return config


@pytest.fixture
def _gpu_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks the GPU, which there is none of here."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation, "_without_headers", lambda: None)


@pytest.mark.usefixtures("_gpu_that_compiles")
def test_auto_compiles_on_a_gpu_and_says_why_where_it_does_not(config_of: Any) -> None:
    model = GPT2LMHeadModel(TINY)
    zero3 = {"kind": "zero", "stage": 3}

    def settled(config: RunConfig) -> tuple[Any, str | None]:
        found, said = compilation.settled(config, model)
        return found.trainer.compile, said

    assert config_of("cpu").trainer.compile == "auto"
    assert settled(config_of("cpu")) == (False, None)
    assert settled(config_of("cuda")) == (True, None)
    assert settled(config_of("cuda", {"kind": "zero", "stage": 2})) == (True, None)
    assert settled(config_of("cuda", {"kind": "fsdp"})) == (True, None)
    assert settled(config_of("cuda", compile=False)) == (False, None)
    assert settled(config_of("cuda", zero3, compile=True)) == (True, None)
    offloads = {"checkpoint_activations_every_blocks": 1, "offload_activations": True}
    assert settled(config_of("cuda", **offloads)) == (False, None)
    assert settled(config_of("cuda", zero3)) == (
        False,
        "trainer.compile=auto: the blocks are not compiled: the hooks of ZeRO's stage 3 around "
        "each layer leave it pieces of a block; trainer.compile=true compiles those",
    )


def test_what_cannot_compile_is_said_by_auto_and_an_error_where_it_was_asked_for(
    config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT2LMHeadModel(TINY)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    found, said = compilation.settled(config_of("cuda"), model)
    assert found.trainer.compile is False
    assert said is not None
    assert "needs Triton and a GPU of compute capability 7.0 or later" in said
    with pytest.raises(UserError, match=r"=true: .* needs Triton .* or set trainer\.compile=false"):
        compilation.settled(config_of("cuda", compile=True), model)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UserError, match="TORCHDYNAMO_DISABLE=1 .* switches .* off; unset it"):
        compilation.settled(config_of("cpu", compile=True), model)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")

    def no_compiler() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(UserError, match=r"=true: torch's compiler needs a C\+\+ compiler"):
        compilation.settled(config_of("cpu", compile=True), model)


@pytest.mark.parametrize("lacking", ["compiler", "headers"])
def test_a_gpu_without_what_kernels_are_built_by_does_not_compile_them(
    lacking: str, config_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a small container, where auto must not end the run at its first step."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    has = {"gcc"} if lacking == "headers" else set()
    monkeypatch.setattr("shutil.which", lambda name: name if name in has else None)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    needed = {"compiler": r"a C compiler \(gcc", "headers": r"Python's headers \(Python.h\)"}
    model = GPT2LMHeadModel(TINY)
    found, said = compilation.settled(config_of("cuda"), model)
    assert found.trainer.compile is False
    assert said is not None
    assert re.search(needed[lacking], said)
    with pytest.raises(UserError, match=f"=true: .*{needed[lacking]}.* or set trainer.compile"):
        compilation.settled(config_of("cuda", compile=True), model)
    (tmp_path / "Python.h").touch()
    if lacking == "headers":
        assert compilation.settled(config_of("cuda"), model)[1] is None


@pytest.mark.usefixtures("_gpu_that_compiles")
def test_a_model_without_blocks_is_left_alone_by_auto(config_of: Any) -> None:
    class Flat(PreTrainedModel):
        config_class = GPT2Config

        def __init__(self) -> None:
            super().__init__(GPT2Config())
            self.head = nn.Linear(2, 2)

    found, said = compilation.settled(config_of("cuda"), Flat())
    assert (found.trainer.compile, said) == (
        False,
        "trainer.compile=auto: the blocks are not compiled: Flat has no list of equal blocks",
    )


def test_a_directory_that_the_user_names_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compilation.CACHE, "")
    monkeypatch.delenv(compilation.CACHE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch._inductor.runtime.cache_dir_utils.cache_dir()  # which sets it
    compilation.keep(tmp_path / "ours")
    assert os.environ[compilation.CACHE] == str(tmp_path / "ours")
    monkeypatch.setenv(compilation.CACHE, "/theirs")
    compilation.keep(tmp_path / "ours")
    assert os.environ[compilation.CACHE] == "/theirs"


def test_what_the_compiler_has_done_is_said_in_a_line() -> None:
    assert Compiled(1).said(12) == "compiled 12 blocks: 1 graph, no graph breaks"
    assert (
        Compiled(3, {"a hook": 2}).said(1) == "compiled 1 block: 3 graphs, 2 graph breaks (a hook)"
    )
    assert Compiled(9, {"a hook": 2, "a print": 5}).said(2) == (
        "compiled 2 blocks: 9 graphs, 7 graph breaks (5 of them: a print)"
    )
    assert Compiled().said(2) == (
        "warning: torch.compile has compiled nothing of 2 blocks: they run uncompiled"
    )
    assert Compiled(1).warning() is None
    warning = Compiled(64, {}, 1).warning()
    assert warning is not None
    assert warning.startswith("warning: torch.compile has given up on 1 function after 64 variants")
    before = Compiled(1, {"a hook": 2, "a print": 1}, 1)
    assert Compiled(4, {"a hook": 3, "a print": 1}, 1).since(before) == Compiled(3, {"a hook": 1})


def test_a_run_says_it_once_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the compiler gives up in an evaluation, long after the first step."""
    done = [Compiled(7)]
    monkeypatch.setattr(compilation, "found", lambda: done[-1])
    (tmp_path / "engine.json").write_text('{"compile": true}')
    console = io.StringIO()
    trainer: Any = SimpleNamespace(
        model=GPT2LMHeadModel(TINY), run_dir=tmp_path, is_world_process_zero=lambda: True
    )
    callback = Compilation(trainer, console)

    def facts() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "engine.json").read_text())
        return found

    callback.on_train_begin(None, None, None)
    done.append(Compiled(8, {"a hook": 1}))
    for _ in range(2):
        callback.on_step_end(None, None, None)
    said = "compiled 2 blocks: 1 graph, 1 graph break (a hook)"
    assert console.getvalue().splitlines() == [said]
    counts = {"graphs": 1, "graph_breaks": {"a hook": 1}, "functions_given_up": 0}
    assert facts() == {"compile": True, "compilation": counts}
    done.append(Compiled(71, {"a hook": 1}, 1))
    for _ in range(2):
        callback.on_evaluate(None, None, None)
    _, warning = console.getvalue().splitlines()
    assert warning.startswith("warning: torch.compile has given up on 1 function after 64 variants")
    done.append(Compiled(72, {"a hook": 1}, 1))
    callback.on_train_end(None, None, None)
    assert facts()["compilation"] == {**counts, "graphs": 65, "functions_given_up": 1}


def test_graphs_breaks_and_giving_up_are_counted() -> None:
    """With torch's own front end and its limit, and no code made of what that finds."""
    torch._dynamo.reset()
    before = compilation.found()

    def step(x: torch.Tensor, factor: float) -> torch.Tensor:
        x = x * factor
        torch._dynamo.graph_break()
        return x + 1

    compiled = torch.compile(step, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled(torch.ones(2), 1.0)
        first = compilation.found().since(before)
        assert first.graphs == 2
        assert sum(first.breaks.values()) == 1
        assert not any("\n" in reason for reason in first.breaks)
        assert first.given_up == 0
        for n in range(2, 6):
            compiled(torch.ones(*[1] * n), float(n))
    assert compilation.found().since(before).given_up > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"compile": False, "compile_mode": "max-autotune-no-cudagraphs"},
            "compile_mode=max-autotune-no-cudagraphs is read where blocks are compiled only, but "
            "compile=false; set compile=true or leave compile_mode out",
        ),
        (
            {"compile": False, "compile_backend": "aot_eager"},
            "compile_backend=aot_eager is read where blocks are compiled only",
        ),
        (
            {"compile_backend": "eager", "compile_mode": "max-autotune-no-cudagraphs"},
            "compile_mode=max-autotune-no-cudagraphs is one of inductor's, but "
            "compile_backend=eager; leave one of them out",
        ),
    ],
)
def test_how_to_compile_is_said_where_it_is_read(
    config_of: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_of("cpu", **fields)


def test_a_backend_that_torch_does_not_know_is_an_error_that_names_those_it_does(
    config_of: Any,
) -> None:
    config = config_of("cuda", compile_backend="inductr")
    with pytest.raises(
        UserError,
        match=r"^trainer\.compile_backend=inductr is none of those that torch knows here "
        r"\(aot_eager, .*inductor.*\); choose one$",
    ):
        compilation.settled(config, GPT2LMHeadModel(TINY))


def test_another_backend_compiles_without_compilers_and_computes_the_same(
    config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: 1 / 0)
    config = config_of("cpu", compile=True, compile_backend="aot_eager")
    model, plain = GPT2LMHeadModel(TINY).eval(), GPT2LMHeadModel(TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert compilation.settled(config, model) == (config, None)
    torch._dynamo.reset()
    before = compilation.found()
    compilation.compile_blocks(model, "aot_eager")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    assert compilation.found().since(before).graphs == 1


@needs_compiler
@pytest.mark.slow
def test_blocks_of_any_shape_share_their_code() -> None:
    """In training and in evaluation, with batches and rows of other lengths."""
    torch._dynamo.reset()
    before = compilation.found()
    model, plain = GPT2LMHeadModel(TINY), GPT2LMHeadModel(TINY)
    plain.load_state_dict(model.state_dict())
    compilation.compile_blocks(model)
    graphs = []
    for rows, length in ((2, 8), (3, 8), (3, 12), (4, 16), (5, 20), (6, 24), (7, 28)):
        tokens = torch.randint(0, 64, (rows, length))
        for found in (model, plain):
            found.train()
            found(input_ids=tokens, labels=tokens).loss.backward()
            found.eval()
            with torch.no_grad():
                found(input_ids=tokens)
        graphs.append(compilation.found().since(before).graphs)
    assert graphs[0] == 2
    assert graphs[-1] == graphs[2] <= 6
    made = compilation.found().since(before)
    assert (made.breaks, made.given_up) == ({}, 0)
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]
    )
