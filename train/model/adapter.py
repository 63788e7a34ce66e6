"""An adapter of peft in a model on the meta device: injected, given first values, described.

peft puts its layers into the model in place, which stays of its own class: a frozen layer X is
X.base_layer then, beside what is trained.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardwright.train.checkpoint.format.layout import AdapterEntry
from shardwright.train.checkpoint.read.merged import NAME, is_of_adapter, whole
from shardwright.train.config import Ia3Adapter, LowRankAdapter, PretrainedModel, RunConfig
from shardwright.train.config.adapter import ALL_LINEAR, PACKAGE
from shardwright.train.errors import UserError, not_installed
from shardwright.train.model.weights import InitialValue, InitialValues, initialized

_MAGNITUDES = f".lora_magnitude_vector.{NAME}.weight"


def inject(
    model: PreTrainedModel, values: InitialValues, config: RunConfig
) -> tuple[PreTrainedModel, InitialValues]:
    """Return a model on the meta device with the adapter that its config asks for, and its values.

    All that is not the adapter's is frozen. Raises UserError where peft is not installed, or the
    model has no layer of the names that are given, or one that cannot have such an adapter.
    """
    section = config.adapter
    if section.trains_all:
        return model, values
    assert isinstance(section, LowRankAdapter | Ia3Adapter)
    settings = _settings(section, config, model)
    _check_heads(model, section)
    before = {parameter: name for name, parameter in model.named_parameters()}
    # Another stream of random numbers than that of what the weights' files lack.
    model, own = initialized(lambda: _injected(model, settings, section), config.seed)
    found: InitialValues = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter in before:
            found[name] = values[before[parameter]]
        elif name.endswith(_MAGNITUDES):
            layer = name.removesuffix(_MAGNITUDES)
            weight = values[before[parameters[f"{layer}.base_layer.weight"]]]
            is_conv = isinstance(model.get_submodule(f"{layer}.base_layer"), Conv1D)
            shape = tuple(parameters[f"{layer}.base_layer.weight"].shape)
            found[name] = _Lengths(weight, shape, transposed=is_conv)
        elif f".modules_to_save.{NAME}." in name:
            original = name.replace(f".modules_to_save.{NAME}.", ".original_module.")
            found[name] = values[before[parameters[original]]]
        else:
            found[name] = dataclasses.replace(own[name], is_drawn=False)  # type: ignore[type-var]
    _check_layers(model, section)
    return model, found


def _settings(
    section: LowRankAdapter | Ia3Adapter, config: RunConfig, model: PreTrainedModel
) -> Any:
    """Return the adapter's config as peft has it."""
    try:
        import peft
    except ModuleNotFoundError:
        raise UserError(not_installed(f"adapter={section.kind}", PACKAGE)) from None
    assert isinstance(config.model, PretrainedModel)
    known: Mapping[str, Any]
    targets: Any = None if section.target_modules is None else list(section.target_modules)
    if targets == [ALL_LINEAR]:
        targets = ALL_LINEAR
    common: dict[str, Any] = {
        "base_model_name_or_path": config.model.name,
        "revision": config.model.revision,
        "task_type": "CAUSAL_LM" if config.objective.kind == "clm" else None,
        "modules_to_save": list(section.modules_to_save) or None,
    }
    architecture = model.config.model_type
    if isinstance(section, Ia3Adapter):
        known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if targets is None and architecture not in known:
            raise UserError(
                f"adapter=ia3 has no layers of its own choice for this model ({architecture}); set "
                "adapter.target_modules and adapter.feedforward_modules"
            )
        forward: Any = section.feedforward_modules
        forward = None if forward is None else list(forward)
        return peft.IA3Config(target_modules=targets, feedforward_modules=forward, **common)
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if targets is None:
        targets = known.get(architecture, ALL_LINEAR)
    alpha = section.alpha
    return peft.LoraConfig(
        r=section.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        use_rslora=section.rank_stabilized,
        use_dora=section.kind == "dora",
        target_modules=targets,
        **common,
    )


def _injected(
    model: PreTrainedModel, settings: Any, section: LowRankAdapter | Ia3Adapter
) -> PreTrainedModel:
    from peft import inject_adapter_in_model

    try:
        # It warns that a layer has its rows as columns, which it then sees to by itself.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(settings, model, NAME)
    except ValueError as error:
        ends = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
        raise UserError(
            f"adapter.target_modules={_shown(section.target_modules)} does not fit the model "
            f"({model.config.model_type}): {error} Its linear layers end in "
            f"{', '.join(sorted(ends))}"
        ) from error
    return model


def _shown(names: tuple[str, ...] | None) -> str:
    return "null" if names is None else f"[{', '.join(names)}]"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _check_heads(model: PreTrainedModel, section: LowRankAdapter | Ia3Adapter) -> None:
    """Raise UserError where the head or the embedding would part from what is tied to it."""
    ends = {name: name.rpartition(".")[2] for name, _ in model.named_modules()}
    words = [model.get_input_embeddings(), model.get_output_embeddings()]
    of_words = {name for name, module in model.named_modules() if module in words}
    head = model.get_output_embeddings()

    def named(names: tuple[str, ...], among: set[str]) -> str | None:
        return next((n for n in names for m in among if m == n or m.endswith(f".{n}")), None)

    if model.config.tie_word_embeddings and (found := named(section.modules_to_save, of_words)):
        raise UserError(
            f"adapter.modules_to_save={_shown(section.modules_to_save)} would train {found}, which "
            "shares its weights with the other end of the model (tie_word_embeddings) and would "
            "part from it; leave it out"
        )
    heads = {name for name, module in model.named_modules() if module is head}
    targets = section.target_modules or ()
    if found := named(targets, heads):
        raise UserError(
            f"adapter.target_modules={_shown(targets)} has the model's head, {found}; leave it "
            "out, or train it whole by adapter.modules_to_save"
        )
    missing = [n for n in section.modules_to_save if named((n,), set(ends)) is None]
    if missing:
        raise UserError(
            f"adapter.modules_to_save={_shown(section.modules_to_save)}: the model has no module "
            f"of the name {missing[0]}; its head is {', '.join(sorted(heads)) or 'of no name'}"
        )


def _check_layers(model: PreTrainedModel, section: LowRankAdapter | Ia3Adapter) -> None:
    """Raise UserError where a layer has an adapter that could not be merged or moved."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and not _is_linear(base):
            raise UserError(
                f"adapter.target_modules={_shown(section.target_modules)} has {name}, a "
                f"{type(base).__name__}; adapters are for linear layers here: leave it out"
            )


@dataclasses.dataclass(frozen=True)
class _Lengths(InitialValue):
    """DoRA's first magnitudes: the length of each output's weights, as peft 0.21 takes it."""

    weight: InitialValue
    shape: tuple[int, int] | Any
    transposed: bool
    comes_whole = True

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        assert start == 0, "it comes whole"
        weight = torch.empty(self.shape)
        self.weight.write(weight)
        out.view(-1).copy_(torch.linalg.norm(weight.T if self.transposed else weight, dim=1))


# --- what is in a live model ----------------------------------------------------------------------


def entry(model: PreTrainedModel) -> AdapterEntry | None:
    """Return what a checkpoint says of a model's adapter; None where it has none."""
    settings = getattr(model, "peft_config", {}).get(NAME)
    if settings is None:
        return None
    described = copy.copy(settings).to_dict()
    described |= {"inference_mode": True}
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "base_layer")
    }
    scalings = {module.scaling[NAME] for module in layers.values() if hasattr(module, "r")}
    return AdapterEntry(
        config={key: _plain(value) for key, value in described.items()},
        scaling=float(scalings.pop()) if scalings else 1.0,
        transposed=[name for name, m in layers.items() if _is_transposed(m.base_layer)],
        feedforward=[name for name, m in layers.items() if getattr(m, "is_feedforward", False)],
    )


def _is_transposed(layer: nn.Module) -> bool:
    """Return whether a weight has a row for each input, or had before it was quantised."""
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, sets in order."""
    return sorted(value) if isinstance(value, set) else value


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without its adapter, on the meta device; itself where it has none."""
    if entry(model) is None:
        return model
    from shardwright.train.model.directory import own_class
    from shardwright.train.model.saved import untie

    with torch.device("meta"):
        plain = own_class(model)(copy.deepcopy(model.config))
    names = (whole(name) for name, _ in model.named_parameters())
    untie(plain, {name for name in names if name is not None})
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def trained_count(model: nn.Module) -> int:
    """Return the number of parameters that are trained, partitioned ones whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def expected(config: RunConfig) -> dict[str, Any]:
    """Return what must be found of the adapter in the live model. Pure."""
    section = config.adapter
    facts: dict[str, Any] = {"adapter": section.kind, "trained_beside_adapter": []}
    if isinstance(section, LowRankAdapter):
        facts |= {
            "adapter_ranks": [section.rank],
            "adapter_scalings": [round(section.scaling, 6)],
            "adapter_dropouts": [section.dropout],
        }
    return facts


def read_back(model: PreTrainedModel) -> dict[str, Any]:
    """Return the same, read off the live model."""
    settings = getattr(model, "peft_config", {}).get(NAME)
    facts: dict[str, Any] = {"adapter": "none", "trained_beside_adapter": []}
    if settings is None:
        return facts
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "base_layer")]
    others = [n for n, p in model.named_parameters() if p.requires_grad != is_of_adapter(n)]
    facts["trained_beside_adapter"] = others[:3]
    if settings.peft_type.value == "IA3":
        return facts | {"adapter": "ia3"}
    dropouts = {getattr(m.lora_dropout[NAME], "p", 0.0) for m in layers}
    return facts | {
        "adapter": "dora" if all(m.use_dora.get(NAME) for m in layers) else "lora",
        "adapter_ranks": sorted({m.r[NAME] for m in layers}),
        "adapter_scalings": sorted({round(m.scaling[NAME], 6) for m in layers}),
        "adapter_dropouts": sorted(dropouts),
    }
