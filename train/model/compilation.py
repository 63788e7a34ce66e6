"""torch.compile of a model's blocks: whether, into what, and what has come of it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.errors import UserError
from shardwright.train.model.blocks import blocks, blocks_or_none
from shardwright.train.process import heartbeat
from shardwright.train.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shardwright.train.config import RunConfig

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch looks for what it has compiled before, by the code, its own version and the machine;
Triton's kernels are within."""
INDUCTOR = "inductor"
"""torch's own compiler, which alone needs others and has modes."""
VARIANTS = 64
"""Of a block's code, at most: equal blocks share theirs, but a model has blocks of several kinds
(ModernBERT of three), each in training and in evaluation, each for one shape and then for any.
torch's own 8 are too few for that; past them it computes the rest uncompiled."""


def settled(config: RunConfig, model: PreTrainedModel) -> tuple[RunConfig, str | None]:
    """Return a rank's config with trainer.compile true or false; why not, where a GPU does not.

    Raises UserError where it is to compile and cannot.
    """
    wanted, on_gpu = config.trainer.compile, config.launcher.device == "cuda"
    is_packed = quantization_of(config.model) != NOT_QUANTIZED
    if wanted == "auto" and (not on_gpu or config.trainer.offload_activations or is_packed):
        return _with(config, compiles=False), None
    if wanted is False:
        return config, None
    _check_backend(config.trainer.compile_backend)
    problem = _hindrance(config)
    if wanted == "auto":
        if problem is None and config.trainer.debug.looks_into_modules:
            problem = "trainer.debug looks into their modules; figures may differ in the last bits"
        if problem is None and not blocks_or_none(model):
            problem = f"{type(model).__name__} has no list of equal blocks"
        if problem is None and config.strategy.hooks_every_layer:
            problem = (
                "the hooks of ZeRO's stage 3 around each layer leave it pieces of a block; "
                "trainer.compile=true compiles those"
            )
        said = f"trainer.compile=auto: the blocks are not compiled: {problem}" if problem else None
        return _with(config, compiles=problem is None), said
    if problem is not None:
        raise UserError(f"trainer.compile=true: {problem}, or set trainer.compile=false")
    return config, None


def _with(config: RunConfig, *, compiles: bool) -> RunConfig:
    trainer = config.trainer.model_copy(update={"compile": compiles})
    return config.model_copy(update={"trainer": trainer})


def _hindrance(config: RunConfig) -> str | None:
    """Return why torch.compile does nothing here, or fails, with the remedy."""
    backend, device = config.trainer.compile_backend, config.launcher.device
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 in the environment switches torch's compiler off; unset it"
    if backend != INDUCTOR:
        return None
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return (
                "torch's compiler needs Triton and a GPU of compute capability 7.0 or later, which "
                "are not both here; `pip install triton`"
            )
        # By which it builds what starts a kernel (triton, runtime/build.py).
        named = os.environ.get("CC")
        if not any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
            return "Triton needs a C compiler (gcc or clang, or what CC names); install one"
        return _without_headers()
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "torch's compiler needs a C++ compiler (g++, or what CXX names); install one"
    return _without_headers()


def _check_backend(backend: str) -> None:
    from torch._dynamo import list_backends

    # All of them: eager and aot_eager, which find where a fault comes from, are tagged as such.
    known = sorted(list_backends(exclude_tags=()))
    if backend not in known:
        raise UserError(
            f"trainer.compile_backend={backend} is none of those that torch knows here "
            f"({', '.join(known)}); choose one"
        )


def _without_headers() -> str | None:
    # What is compiled on either device is a module of Python's.
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    folders = [sysconfig.get_path("include", scheme) for scheme in schemes]
    for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        folders += os.environ.get(name, "").split(os.pathsep)
    if any(Path(folder, "Python.h").exists() for folder in folders if folder):
        return None
    return (
        "torch's compiler needs Python's headers (Python.h), which are not here; install what your "
        "system calls python3-dev or python3-devel"
    )


def compile_blocks(model: PreTrainedModel, backend: str = INDUCTOR, mode: str = "default") -> None:
    """torch.compile each block in place: equal blocks compile once, and no name changes.

    Their first shape is compiled as it is; with the second torch compiles once more, for any size
    of what has changed, and no further shape of that kind costs anything.
    """
    import torch

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * VARIANTS)
    heartbeat.while_compiling()
    for block in blocks(model):
        # A mode is inductor's: torch refuses one beside another backend.
        block.compile(backend=backend, mode=mode if backend == INDUCTOR else None)


def leave_hooks_alone(model: PreTrainedModel) -> None:
    """Have the compiler stop at the hooks around what is within blocks, instead of tracing them.

    Those of ZeRO's stage 3 differ from layer to layer and from step to step (deepspeed 0.19): it
    made 64 variants of one of them for two small blocks, and compiled for minutes.
    """
    import torch

    for module in {inner for block in blocks(model) for inner in block.modules()}:
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = torch.compiler.disable(hook)


def keep(directory: Path) -> None:
    """Have torch keep what it compiles in a directory, unless the user or a launcher names one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets it itself where it has looked for its own (2.13, cache_dir of the same module).
    if os.environ.get(CACHE) in (None, default_cache_dir()):
        os.environ[CACHE] = str(directory)


@dataclass(frozen=True)
class Compiled:
    """What torch's compiler has done in this process."""

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    """How often each reason has divided what it was to compile."""
    given_up: int = 0
    """Functions of which it has made so many variants that it runs new ones uncompiled."""

    def since(self, before: Compiled) -> Compiled:
        breaks = {r: n - before.breaks.get(r, 0) for r, n in self.breaks.items()}
        return Compiled(
            self.graphs - before.graphs,
            {reason: number for reason, number in breaks.items() if number},
            self.given_up - before.given_up,
        )

    def facts(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "graph_breaks": self.breaks,
            "functions_given_up": self.given_up,
        }

    def said(self, number: int) -> str:
        """Return one line about ``number`` blocks that were to be compiled. Pure."""
        if not self.graphs:
            return (
                f"warning: torch.compile has compiled nothing of {counted(number, 'block')}: they "
                "run uncompiled"
            )
        text = f"compiled {counted(number, 'block')}: {counted(self.graphs, 'graph')}, "
        if not self.breaks:
            return text + "no graph breaks"
        total = sum(self.breaks.values())
        reason, times = max(self.breaks.items(), key=lambda item: item[1])
        most = f"{times} of them: {reason}" if times < total else reason
        return text + f"{counted(total, 'graph break')} ({most})"

    def warning(self) -> str | None:
        """Return what is said where some of the model runs uncompiled now. Pure."""
        if not self.given_up:
            return None
        return (
            f"warning: torch.compile has given up on {counted(self.given_up, 'function')} after "
            f"{VARIANTS} variants of it: what differs from all of them runs uncompiled, and "
            "slower; the rank's log says what keeps changing (TORCH_LOGS=recompiles says more)"
        )


def found() -> Compiled:
    """Return what the compiler has done in this process since it began."""
    from torch._dynamo.utils import counters

    breaks: dict[str, int] = {}
    for text, number in counters["graph_break"].items():
        reason = str(text).strip().partition("\n")[0]
        breaks[reason] = breaks.get(reason, 0) + number
    # torch counts what it does not compile by its reason; that of its limit begins so (2.13,
    # _dynamo/convert_frame.py, raise_unimplemented_cache_limit_exceeded).
    limited = (n for t, n in counters["unimplemented"].items() if "recompile limit" in str(t))
    return Compiled(counters["stats"]["unique_graphs"], breaks, sum(limited))
