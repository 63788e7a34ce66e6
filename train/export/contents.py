"""What of a checkpoint goes into a model directory: each tensor that `from_pretrained` expects."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PreTrainedModel

from shardwright.train.checkpoint.format.lazy import LazyTensor, PortableState
from shardwright.train.checkpoint.format.outputs import Output, Place
from shardwright.train.errors import UserError
from shardwright.train.model.conversion import CannotTrace, assembled, loaded, placed

logger = logging.getLogger(__name__)

_COMPARED_ELEMENTS = 2**18


@dataclass(frozen=True)
class Contents:
    """The tensors of a model, in its own order: parameters, tied ones once, then buffers."""

    tensors: Mapping[str, LazyTensor]
    outputs: tuple[Output, ...]
    """As `save_pretrained` names and divides them."""
    places: Mapping[str, tuple[Place, ...]]
    """Which parts of which outputs the tensors become, where they are not outputs themselves."""
    parameters: int
    """How many numbers the parameters have."""
    notes: list[str] = field(default_factory=list)
    """What a user should know."""


def contents(
    model: PreTrainedModel,
    state: PortableState,
    dtype: torch.dtype,
    *,
    ema: bool = False,
    allow_upcast: bool = False,
) -> Contents:
    """Return a checkpoint's tensors by the names of a model on the meta device.

    The checkpoint's own names are the model's, or those which `from_pretrained` knows. Parameters
    are to be written in ``dtype``, buffers in that which they have. Raises UserError where one is
    missing, of another shape or not of the model, and where fp32 is asked for of what the
    checkpoint holds in 16 bits only.
    """
    notes: list[str] = []
    found, weights = _by_the_models_names(model, state, ema, notes)
    tied = _tied(model)
    tensors = _parameters(tied, weights, notes)
    parameters = list(tensors)
    tensors |= _buffers(model, tied, found)
    if problems := list(_problems(model, tied, tensors, found)):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            "the checkpoint holds another model than its config describes: "
            f"{'; '.join(problems[:3])}{more}"
        )
    if dtype == torch.float32 and not allow_upcast:
        _check_masters({name: tensors[name] for name in parameters})
    outputs = [
        Output(name, tensor.shape, dtype if name in parameters else tensor.dtype)
        for name, tensor in tensors.items()
    ]
    outputs, places = _as_saved(model, outputs, notes)
    return Contents(
        tensors, tuple(outputs), places, sum(tensors[name].numel for name in parameters), notes
    )


def _by_the_models_names(
    model: PreTrainedModel, state: PortableState, ema: bool, notes: list[str]
) -> tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]]:
    """Return all tensors of a checkpoint, and those that may be parameters, by the model's names.

    What the model does not have is among them, under its own name.
    """
    if ema and not state.ema:
        raise UserError(
            "--ema: the checkpoint keeps no moving average of the weights; leave it out to take "
            "the weights themselves"
        )
    weights = state.ema if ema else state.weights
    found = {**state.weights, **state.buffers, **weights}
    if all(any(name in weights for name in names) for names in _tied(model)):
        return found, weights
    # Of a parameter that the average lacks, the weight itself must not stand in for it.
    averaged = {n: t for n, t in found.items() if not (ema and n in state.weights.keys() - weights)}
    converted = _converted(model, averaged, notes)
    return (found, weights) if converted is None else (converted, converted)


def _parameters(
    tied: list[list[str]], weights: Mapping[str, LazyTensor], notes: list[str]
) -> dict[str, LazyTensor]:
    """Return the parameters that are there, tied ones once where they are the same."""
    tensors = {}
    for names in tied:
        different = list(_different([name for name in names if name in weights], weights))
        for i, name in enumerate(different):
            # The first under the name that the others are tied to when they are loaded.
            tensors[name if i else names[0]] = weights[name]
        for name in different[1:]:
            notes.append(f"{names[0]} and {name} are tied in the config and differ here: both stay")
    return tensors


def _buffers(
    model: PreTrainedModel, tied: list[list[str]], found: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    aliases = {name for names in tied for name in names}
    expected = (name for name in model.state_dict() if name not in aliases)
    return {name: found[name] for name in expected if name in found}


def _problems(
    model: PreTrainedModel,
    tied: list[list[str]],
    tensors: Mapping[str, LazyTensor],
    found: Mapping[str, LazyTensor],
) -> Iterator[str]:
    """Yield how the tensors that were found are not those of the model."""
    expected = model.state_dict(keep_vars=True)
    yield from (f"{names[0]} is missing" for names in tied if names[0] not in tensors)
    aliases = {name for names in tied for name in names}
    for name in expected:
        if name not in aliases and name not in tensors:
            yield f"the buffer {name} is missing"
    for name, tensor in tensors.items():
        if tensor.shape != tuple(expected[name].shape):
            yield f"{name} has shape {tensor.shape}, not {tuple(expected[name].shape)}"
        elif tensor.dtype.is_floating_point != expected[name].is_floating_point():
            yield f"{name} is in {_word(tensor.dtype)}, not {_word(expected[name].dtype)}"
    yield from (f"{name} is not in the model" for name in _unexpected(model, found))


def _as_saved(
    model: PreTrainedModel, outputs: list[Output], notes: list[str]
) -> tuple[list[Output], dict[str, tuple[Place, ...]]]:
    """Return the tensors as `save_pretrained` names and divides them, where that can be told."""
    try:
        return placed(model, outputs)
    except CannotTrace as error:
        notes.append(
            f"transformers saves {type(model).__name__} in another form, which cannot be streamed "
            f"({error}): names are those of the model in memory, and versions of transformers "
            f"other than {transformers.__version__} may not know them"
        )
        return outputs, {}


def _converted(
    model: PreTrainedModel, found: Mapping[str, LazyTensor], notes: list[str]
) -> dict[str, LazyTensor] | None:
    """Return a checkpoint's tensors as `from_pretrained` would take them, by the model's names.

    What it does not take stays under its own name. None where it takes less than its names say.
    Raises UserError where it computes with them.
    """
    best, taken_prefix = None, ""
    for prefix in _prefixes(found):
        named = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        try:
            known = loaded(
                model,
                {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in named.items()},
            )
        except Exception as error:  # of another shape, for instance, which is said by the caller
            logger.info("transformers does not load it: %s", error)
            continue
        if best is None or len(known.tensors) > len(best.tensors):
            best, taken_prefix = known, prefix
    if best is None:
        return None
    if best.computed:
        raise UserError(
            f"transformers computes {best.computed[0]} out of several tensors of the checkpoint; "
            "load it with from_pretrained, save it with save_pretrained, and recover that"
        )
    if len(best.tensors) <= sum(name in found for name in best.tensors):
        return None
    if taken_prefix:
        notes.append(f"every name in the checkpoint begins with {taken_prefix}, which is left out")
    named = {name.removeprefix(taken_prefix): tensor for name, tensor in found.items()}
    # Those that are refused keep a name that says which they are.
    refused = {name: named[name] for name in best.unexpected if name in named}
    return {name: assembled(tensor, named) for name, tensor in best.tensors.items()} | refused


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return what may stand before the model's own names: nothing, or what all names begin with."""
    prefixes = [""]
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{parts[0]}.")
    return prefixes


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of each parameter, the one of `named_parameters` first."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _different(names: list[str], weights: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Yield of the names of one parameter those under which a checkpoint has different values.

    Where they are in several dtypes, those in narrower ones are copies of the widest.
    """
    widest = max((weights[name].dtype.itemsize for name in names), default=0)
    kept: list[str] = []
    for name in names:
        tensor = weights[name]
        if tensor.dtype.itemsize < widest:
            continue
        if not any(_equal(tensor, weights[other]) for other in kept):
            kept.append(name)
            yield name


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    if one == other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(
        torch.equal(
            one.read(start, stop).view(torch.uint8), other.read(start, stop).view(torch.uint8)
        )
        for start in range(0, one.numel, _COMPARED_ELEMENTS)
        for stop in [min(start + _COMPARED_ELEMENTS, one.numel)]
    )


def _unexpected(model: PreTrainedModel, found: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Yield what the model does not have, but for what `from_pretrained` skips too.

    Older versions of transformers saved buffers that today's compute.
    """
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS_OF_OLD]
    for name in found:
        if name not in known and not any(re.search(pattern, name) for pattern in ignored):
            yield name


_BUFFERS_OF_OLD = (
    r"(^|\.)(attn|attention|self_attention)\.(masked_)?bias$",  # GPT-2's and GPT-NeoX's masks
    r"(^|\.)rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
)
"""What versions before 4.31 saved of every model, and today's load with a warning only."""


def _check_masters(parameters: Mapping[str, LazyTensor]) -> None:
    narrow = {name: t for name, t in parameters.items() if t.dtype.itemsize < 4}
    if not narrow:
        return
    name, tensor = next(iter(narrow.items()))
    word = _word(tensor.dtype)
    of = "all" if len(narrow) == len(parameters) else f"{len(narrow)} of {len(parameters)}"
    raise UserError(
        f"the checkpoint holds no fp32 master weights of {name}, which is in {word} there "
        f"({of} parameters are without). Add --dtype={word if word in DTYPES else 'bf16'} to write "
        "what it holds, or --allow-upcast to write the same rounded values in fp32"
    )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _word(dtype: torch.dtype) -> str:
    words = {value: word for word, value in DTYPES.items()}
    return words.get(dtype, str(dtype).removeprefix("torch."))
