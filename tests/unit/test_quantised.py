"""Quantised bases without ranks: what is refused, packed as transformers does, and read again."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from shardwright.launchers import messages, preflight
from shardwright.launchers.plan import saves, speed
from shardwright.launchers.plan.states import states
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.checkpoint.format.layout import BaseEntry, Manifest
from shardwright.train.checkpoint.format.lazy import PortableState
from shardwright.train.checkpoint.read import merged, portable
from shardwright.train.config import LowRankAdapter, PretrainedModel, from_tree
from shardwright.train.config.adapter import LoraAdapter
from shardwright.train.errors import UserError
from shardwright.train.export import card_text
from shardwright.train.export.recover import Options, recover
from shardwright.train.loop.saving import save
from shardwright.train.model import adapter, adapter_base, pretrained, quantised, saved
from shardwright.train.model.blocks import parameter_count
from shardwright.train.model.directory import config_texts
from shardwright.train.model.first_values import materialize
from shardwright.train.model.streaming import streamed, weight_files
from shardwright.train.model.weights import InitialValues, InMemory, Owners
from shardwright.train.plan.facts import ModelFacts
from shardwright.train.plan.held import local
from shardwright.train.plan.model import facts_of
from shardwright.train.plan.packed import packed_sizes
from shardwright.train.plan.trace import traced
from shardwright.train.strategy.state.dcp import DistributedState
from shardwright.train.strategy.state.plans import Plans
from tests.unit import test_adapters as adapters
from tests.unit import trees
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

BITS = ("8bit", "4bit")
MODELS = ("llama", "gpt2", "roberta")
LORA = LoraAdapter(kind="lora", rank=3, alpha=5.0, target_modules=("all-linear",))


def quantised_tree(bits: str = "4bit", /, **sections: Any) -> dict[str, Any]:
    tree = {**adapters.PRETRAINED}
    tree["model"] = {**tree["model"], "quantization": bits}
    return {**tree, **sections}


def test_a_config_of_before_quantises_nothing() -> None:
    config = from_tree(adapters.PRETRAINED)
    assert isinstance(config.model, PretrainedModel)
    assert config.model.quantization == "none"
    assert quantised.expected(config)["packed_weights"] == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"adapter": {"kind": "none"}},
            "model.quantization=4bit with adapter=none would train quantised weights, which have "
            "no gradients; choose adapter=lora, or model.quantization=none",
        ),
        (
            {"adapter": {"kind": "dora"}},
            "model.quantization=4bit with adapter=dora, which divides by the lengths of weights "
            "that it would find rounded and export whole; choose adapter=lora",
        ),
        (
            {"strategy": trees.ZERO3},
            "model.quantization=4bit with strategy=zero3 would keep each packed weight gathered "
            "from the forward pass to the backward pass, and so whole on every rank; choose "
            "strategy=zero2 or fsdp, or model.quantization=none",
        ),
        (
            {"trainer": {**trees.TREE["trainer"], "compile": True}},
            "model.quantization=4bit with trainer.compile=true, which has not been tried on "
            "quantised layers; set trainer.compile=false, or auto, which then compiles nothing",
        ),
    ],
)
def test_what_a_quantised_base_does_not_allow(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        from_tree(quantised_tree(**sections))
    assert message in str(told.value)


def test_a_mac_has_no_kernels_for_it() -> None:
    launcher = {"kind": "local", "device": "mps"}
    with pytest.raises(UserError) as told:
        from_tree(quantised_tree("8bit", launcher=launcher, strategy={"kind": "ddp"}))
    assert (
        "model.quantization=8bit needs kernels that are tried on CUDA GPUs and CPUs alone, but "
        "launcher.device=mps; set model.quantization=none" in str(told.value)
    )


def test_a_package_that_is_not_installed_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    message = (
        "model.quantization=4bit needs the package bitsandbytes, which is not installed; "
        "`pip install bitsandbytes`"
    )
    config = from_tree(quantised_tree(strategy={"kind": "ddp"}))
    assert message in preflight._missing_packages(config)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model, _ = adapters.injected("llama", adapters.saved("llama", tmp_path / "base"), LORA)
    with pytest.raises(UserError) as told:
        quantised.Quantiser(model, "4bit", torch.float32, "cpu")
    assert str(told.value) == message


OF_A_RUN = (
    *("model=pretrained", "model.name=some/model", "model.quantization=4bit", "adapter=lora"),
    *("tokenizer=pretrained", "tokenizer.name=a/b", "data.sequence_length=64"),
)


def test_a_command_line_composes_one_and_plans_no_speed_of_it(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "--dry-run", *OF_A_RUN, "strategy=single")
    assert (outcome.code, outcome.err) == (0, "")
    assert "quantization: 4bit" in outcome.out
    outcome = shardwright("plan", *OF_A_RUN, "strategy=ddp", "hardware=h100", "precision=bf16")
    assert outcome.code == 2
    assert "how long weights take to be unpacked" in outcome.err


# --- in a model -----------------------------------------------------------------------------------


def filled(
    name: str,
    directory: Path,
    bits: str,
    compute: torch.dtype = torch.float32,
    section: LowRankAdapter = LORA,
) -> tuple[PreTrainedModel, InitialValues]:
    """Return a model with an adapter beside quantised weights, and the values of all."""
    model, values = adapters.injected(name, directory, section)
    quantiser = quantised.Quantiser(model, bits, compute, "cpu")
    materialize(model, values, torch.float32, "cpu", quantiser.take)
    quantiser.finish(model)
    return model, values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_packed_as_transformers_packs_them(name: str, bits: str, tmp_path: Path) -> None:
    directory = adapters.saved(name, tmp_path / "base")
    model, _ = filled(name, directory, bits)
    settings = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit", bnb_4bit_quant_type="nf4"
    )
    expected = adapters.auto(name).from_pretrained(
        directory, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    found, wanted = quantised.layers(model), quantised.layers(expected)
    assert {n.removesuffix(".base_layer") for n in found} == wanted.keys()
    for layer_name, layer in found.items():
        other = wanted[layer_name.removesuffix(".base_layer")]
        assert torch.equal(layer.weight, other.weight)
        assert not layer.weight.requires_grad
    for mine, theirs in zip(quantised.scales(model), quantised.scales(expected), strict=True):
        assert torch.equal(mine, theirs)
    facts = quantised.read_back(model)
    config = from_tree(quantised_tree(bits, strategy={"kind": "ddp"}))
    assert facts == quantised.expected(config)


@pytest.mark.parametrize("bits", BITS)
def test_only_the_adapter_has_gradients_and_the_loss_falls(bits: str, tmp_path: Path) -> None:
    model, _ = filled("llama", adapters.saved("llama", tmp_path / "base"), bits)
    ids = torch.arange(5, 25)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    before = [layer.weight.clone() for layer in quantised.layers(model).values()]
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():  # an evaluation leaves no trace in what is trained next
            model.eval()(ids)
            model.train()
    assert losses[-1] < losses[0]
    after = [layer.weight for layer in quantised.layers(model).values()]
    assert all(map(torch.equal, before, after))


def test_layers_compute_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    directory = adapters.saved("roberta", tmp_path / "base")
    for bits in BITS:
        model, _ = filled("roberta", directory, bits, torch.bfloat16)
        layer = next(iter(quantised.layers(model).values()))
        given = torch.randn(2, layer.in_features)
        assert layer(given).dtype == torch.bfloat16
        # It would be cast in place at the first use.
        assert {layer.bias.dtype for layer in quantised.layers(model).values()} == {torch.bfloat16}


def test_a_product_keeps_its_packed_weight_for_the_backward_pass(tmp_path: Path) -> None:
    # Which is why ZeRO-3, that gives a gathered weight up by leaving it to its last user, frees
    # nothing of it.
    for bits in BITS:
        model, _ = filled("llama", adapters.saved("llama", tmp_path / bits), bits)
        layer: Any = next(iter(quantised.layers(model).values()))
        memory = layer.weight.data_ptr()
        product: Any = layer(torch.randn(2, layer.in_features, requires_grad=True)).grad_fn
        kept = product.tensors[1] if bits == "4bit" else product.state.CB
        assert kept.data_ptr() == memory


def test_what_is_divided_is_whole_again_when_it_is_gathered(tmp_path: Path) -> None:
    directory = adapters.saved("roberta", tmp_path / "base")
    for bits in BITS:
        expected, _ = filled("roberta", directory, bits)
        model, values = adapters.injected("roberta", directory, LORA)
        quantiser = quantised.DividingQuantiser(model, bits, torch.float32, "cpu")
        assert parameter_count(model) == parameter_count(expected)
        owners = Owners(model)
        for name, parameter in list(model.named_parameters()):
            whole = torch.empty(quantiser.elements[name])
            values[name].write(whole)
            found = quantiser.codes_of(name, whole).view(parameter.shape)
            owners.replace(parameter, found.clone())
        quantiser.finish(model)
        assert quantised.digest_of(model) == quantised.digest_of(expected)
        assert quantised.read_back(model) == quantised.read_back(expected)
        ids = torch.arange(5, 25)[None]
        for each in (model.eval(), expected.eval()):  # there is dropout
            each(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) == (not one.requires_grad)
            assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
def test_packed_weights_are_counted_whole_and_measured_packed(bits: str, tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    plain, _ = adapters.injected("llama", directory, LORA)
    names = quantised.to_be_quantised(plain)
    count = parameter_count(plain)
    model, _ = filled("llama", directory, bits)
    assert parameter_count(model) == count
    assert names.keys() == quantised.layers(model).keys()
    held = [layer.weight for layer in quantised.layers(model).values()]
    measured = sum(local(t).nbytes for t in [*held, *quantised.scales(model)])
    sizes = packed_sizes(plain, from_tree(quantised_tree(bits, strategy={"kind": "ddp"}))).values()
    assert sum(each.codes + each.scales for each in sizes) == measured


@pytest.mark.parametrize("bits", BITS)
def test_state_dicts_have_no_packed_weight(bits: str, tmp_path: Path) -> None:
    model, _ = filled("roberta", adapters.saved("roberta", tmp_path / "base"), bits)
    state = model.state_dict()
    for name in quantised.layers(model):
        assert {key for key in state if key.startswith(f"{name}.")} == {f"{name}.bias"}
    # And torch's checkpoints find their way through it.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    assert of_model.keys() == state.keys()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(of_optimizer["state"]) == names


# --- in a plan ------------------------------------------------------------------------------------


def planned_config(name: str, directory: Path, bits: str, **sections: Any) -> Any:
    tree = quantised_tree(bits, **{"strategy": {"kind": "ddp"}, **sections})
    tree["model"] = {**tree["model"], "name": str(directory)}
    tree["adapter"] = {**LORA.model_dump(mode="json")}
    tree["data"] = {**tree["data"], "sequence_length": 32}
    tree["objective"] = {"kind": "mlm" if name == "roberta" else "clm"}
    return from_tree(tree)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_counts_what_a_rank_holds(name: str, bits: str, tmp_path: Path) -> None:
    directory = adapters.saved(name, tmp_path / "base")
    config = planned_config(name, directory, bits, precision=trees.BF16)
    plain, _ = adapters.injected(name, directory, LORA)
    facts = facts_of(plain, config)
    model, _ = filled(name, directory, bits, torch.bfloat16)
    held = [*model.parameters(), *quantised.scales(model)]
    assert facts.is_packed
    assert states(config, facts).device.weights == sum(tensor.nbytes for tensor in held)
    assert states(config, facts).device.gradients == 4 * facts.trained.count
    assert facts == ModelFacts.of_json(json.loads(json.dumps(facts.as_json())))
    # A checkpoint has the adapter in fp32, with two moments, and nothing else.
    parts = saves._bytes_of_ranks(config, facts)
    assert sum(parts) / 2 * config.launcher.world_size == 12 * facts.trained.count


@pytest.mark.parametrize("bits", BITS)
def test_a_plan_divides_codes_among_ranks_and_gathers_them_as_they_are(
    bits: str, tmp_path: Path
) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    config = planned_config("llama", directory, bits, strategy=trees.FSDP, precision=trees.BF16)
    ranks = config.launcher.world_size
    plain, _ = adapters.injected("llama", directory, LORA)
    facts = facts_of(plain, config)
    packed = [each.packed for each in facts.parameters if each.packed is not None]
    codes = sum(each.codes for each in packed)
    others = [each for each in facts.parameters if each.packed is None]
    scales = sum(each.scales for each in packed)
    parts = sum(4 * -(-each.rows // ranks) * (each.elements // each.rows) for each in others)
    assert states(config, facts).device.weights == codes / ranks + scales + parts
    units, root = facts.gathered_bytes(2)
    assert sum(units) + root == codes + 2 * sum(each.elements for each in others)
    assert root == 2 * plain.model.norm.weight.numel()
    assert len(units) == len(facts.units)
    # DeepSpeed's first rank writes the rounded copy of what is trained, too.
    zero = planned_config("llama", directory, bits, strategy=trees.ZERO2, precision=trees.BF16)
    first, other = saves._bytes_of_ranks(zero, facts)
    assert first + (ranks - 1) * other == (12 + 2) * facts.trained.count
    assert states(zero, facts).device.weights == codes + scales + 2 * sum(
        each.elements for each in others
    )


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_trace_keeps_no_copy_of_what_is_unpacked(name: str, tmp_path: Path) -> None:
    directory = adapters.saved(name, tmp_path / "base")
    kept = {}
    for bits in ("none", *BITS):
        found = traced(planned_config(name, directory, bits, precision=trees.BF16), autocast=True)
        kept[bits] = found.kept
        assert found.flops > 0
        assert found.backward > 0
    plain, _ = adapters.injected(name, directory, LORA)
    to_be: dict[str, Any] = {**quantised.to_be_quantised(plain)}
    packed = sum(layer.weight.numel() for layer in to_be.values())
    # Autocast keeps its copies of weights for the backward pass; packed ones are unpacked again.
    # Nothing flows back through what the first block's attention takes in: three of 16 by 16.
    assert kept["none"] - kept["4bit"] == 2 * (packed - 3 * 16 * 16)
    # Of 8 bits what went into each layer is kept.
    assert kept["8bit"] > kept["4bit"]


def test_a_plan_of_speeds_is_refused(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    config = planned_config("llama", directory, "4bit", precision=trees.BF16)
    device: Any = None
    assert speed.lacking(config, device) == (
        "model.quantization=4bit: how long weights take to be unpacked for each product is not "
        "known here, and what is left to a plan is chosen by its speed; choose a strategy, of "
        "which fsdp divides packed weights, and a trainer.micro_batch_size, and look at the report "
        "of a few steps (trainer.max_steps=20)"
    )


# --- the base, read again -------------------------------------------------------------------------


def values_of(name: str, directory: Path) -> tuple[PreTrainedModel, InitialValues]:
    model = adapters.auto(name).from_pretrained(directory)
    built, values = streamed(
        lambda: type(model)(model.config), weight_files(str(directory), None, model.config), 0
    )
    return built, values


def checkpoint_of(
    model: PreTrainedModel, place: Path, base_directory: Path
) -> tuple[PortableState, Manifest]:
    """Return the state and the manifest of a checkpoint that leaves the base out."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, place)
    digest = quantised.digest_of(model)
    assert digest is not None
    manifest: dict[str, Any] = {
        "step": 1,
        "files": {},
        "parameters": [{"name": name} for name, _ in model.named_parameters()],
        "adapter": adapter.entry(model),
        "base": BaseEntry(name=str(base_directory), digest=digest),
    }
    return portable.read(place), Manifest(**manifest)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_merged_is_the_base_as_it_was_with_the_adapter_added(
    name: str, tmp_path: Path
) -> None:
    directory = adapters.saved(name, tmp_path / "base")
    section = LORA
    if name == "llama":
        section = LORA.model_copy(update={"modules_to_save": ("lm_head",)})
    model, _ = filled(name, directory, "4bit", section=section)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    state, manifest = checkpoint_of(model, tmp_path / "trained.safetensors", directory)
    plain = adapter.bare(model)
    found = adapter_base.completed(state, manifest, plain, tmp_path / "checkpoint-1")
    assert manifest.adapter is not None
    whole = merged.merged(found, manifest.adapter).weights
    assert whole.keys() == {n for n, _ in plain.named_parameters()}

    # The same as of an adapter beside weights that were never quantised.
    unpacked, values = adapters.injected(name, directory, section)
    materialize(unpacked, values, torch.float32, "cpu")
    tensors = {n: p.detach() for n, p in unpacked.named_parameters()} | load_file(
        tmp_path / "trained.safetensors"
    )
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "all.safetensors")
    entry = adapter.entry(unpacked)
    assert entry is not None
    assert entry == manifest.adapter
    expected = merged.merged(portable.read(tmp_path / "all.safetensors"), entry).weights
    for key, tensor in expected.items():
        assert torch.equal(whole[key].whole(), tensor.whole())
        start, stop = tensor.numel // 3, tensor.numel - 1
        buffer = torch.empty((stop - start) * 4, dtype=torch.uint8)
        part = whole[key].read(start, stop, buffer)
        assert torch.equal(part, tensor.read(start, stop))


def test_a_base_that_has_changed_is_told_by_its_hash(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model, _ = filled("llama", directory, "8bit")
    state, manifest = checkpoint_of(model, tmp_path / "trained.safetensors", directory)
    plain, checkpoint = adapter.bare(model), tmp_path / "checkpoint-1"
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as told:
        adapter_base.completed(state, manifest, plain, checkpoint)
    assert str(told.value) == (
        f"{checkpoint} holds an adapter alone, and the weights of {directory} are not those that "
        "it was trained beside: their values have another hash. Give those again: under the same "
        "name, or to `shardwright recover` by --base"
    )
    # Who does not look finds no fault.
    assert adapter_base.completed(state, manifest, plain, checkpoint, checks=False).weights


def test_a_base_that_is_gone_is_found_where_it_lies_now(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model, _ = filled("llama", directory, "4bit")
    state, manifest = checkpoint_of(model, tmp_path / "trained.safetensors", directory)
    moved = directory.rename(tmp_path / "moved")
    plain, checkpoint = adapter.bare(model), tmp_path / "checkpoint-1"
    with pytest.raises(UserError) as told:
        adapter_base.completed(state, manifest, plain, checkpoint)
    text = str(told.value)
    assert text.startswith(
        f"{checkpoint} holds an adapter alone, and the weights of {directory}, which it was "
        "trained beside, cannot be read (there is no such directory); bring them back, or give"
    )
    assert text.endswith(
        "bring them back, or give `shardwright recover` the directory that holds them by --base, "
        "or --adapter to take the adapter alone"
    )
    found = adapter_base.completed(state, manifest, plain, checkpoint, moved)
    assert {n for n, _ in model.named_parameters()} == found.weights.keys()


def test_another_architecture_is_told_by_the_names_that_it_lacks(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model, _ = filled("llama", directory, "4bit")
    state, manifest = checkpoint_of(model, tmp_path / "trained.safetensors", directory)
    other = adapters.saved("gpt2", tmp_path / "other")
    another, _ = values_of("gpt2", other)
    with pytest.raises(UserError, match=r"was trained beside a model that has model\.\S+, and"):
        adapter_base.completed(state, manifest, another, tmp_path / "checkpoint-1", other)


def test_a_whole_checkpoint_is_left_as_it_is() -> None:
    state = PortableState({}, {}, {})
    manifest = Manifest(step=1, files={})
    model: Any = None
    assert adapter_base.completed(state, manifest, model, Path("/c")) is state


def test_a_digest_is_the_same_whole_and_in_parts_and_in_any_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_base, "_READ_ELEMENTS", 7)
    tensors = {"a": torch.randn(5, 8), "b": torch.randn(3)}
    whole, parts = adapter_base.Digest(), adapter_base.Digest()
    for name, tensor in tensors.items():
        whole.add(name, tensor)
    for name, tensor in reversed(tensors.items()):
        parts.add_read(name, InMemory(tensor), tensor.numel())
    assert whole.hexdigest() == parts.hexdigest()
    tensors["b"][0] += 1
    changed = adapter_base.Digest()
    for name, tensor in tensors.items():
        changed.add(name, tensor)
    assert changed.hexdigest() != whole.hexdigest()


def test_a_resume_takes_what_is_left_out_from_the_base(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model, values = filled("llama", directory, "4bit")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    state, _ = checkpoint_of(model, tmp_path / "trained.safetensors", directory)
    fresh, _ = adapters.injected("llama", directory, LORA)
    of = saved.Saved(tmp_path, state, (), "cannot be read: {error}")
    found = saved.first_values(fresh, of, values)
    quantiser = quantised.Quantiser(fresh, "4bit", torch.float32, "cpu")
    materialize(fresh, found, torch.float32, "cpu", quantiser.take)
    quantiser.finish(fresh)
    assert quantised.digest_of(fresh) == quantised.digest_of(model)
    for (name, one), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(UserError, match="holds another model than the config describes"):
        saved.first_values(adapters.injected("llama", directory, LORA)[0], of)
    # What is trained is never taken from the base.
    fewer = replace(state, weights=dict(list(state.weights.items())[1:]))
    of = replace(of, state=fewer)
    with pytest.raises(UserError, match="holds another model than the config describes"):
        saved.first_values(adapters.injected("llama", directory, LORA)[0], of, values)


@pytest.mark.parametrize(
    ("is_quantised", "has_manifest", "reason"),
    [
        (True, False, "they are quantised already"),
        (False, True, "it is a checkpoint of a run, which may be deleted; give final/"),
    ],
)
def test_what_could_not_be_read_again_is_not_quantised(
    is_quantised: bool, has_manifest: bool, reason: str, tmp_path: Path
) -> None:
    if has_manifest:
        (tmp_path / "manifest.json").write_text("{}")
    section = PretrainedModel(kind="pretrained", name=str(tmp_path), quantization="4bit")
    with pytest.raises(UserError) as told:
        pretrained._check_can_be_read_again(section, is_quantised=is_quantised)
    assert str(told.value) == (
        "model.quantization=4bit: checkpoints hold what is trained alone, and the weights of "
        f"model.name={tmp_path} cannot be read one tensor at a time: {reason}. Save them in "
        "safetensors as `from_pretrained` loads them, or set model.quantization=none"
    )


def test_a_base_is_named_by_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    config: Any = SimpleNamespace(
        model=PretrainedModel(kind="pretrained", name="base", revision="v1"), seed=7
    )
    model = torch.nn.Linear(1, 1)
    adapter_base.note_revision(model, [str(tmp_path / "base" / "model.safetensors")])
    found = adapter_base.entry(config, model, "0" * 32)
    assert (found.name, found.revision, found.seed) == (str(tmp_path / "base"), "v1", 7)
    config.model = PretrainedModel(kind="pretrained", name="some/model")
    assert adapter_base.entry(config, model, "0" * 32).name == "some/model"
    # Of the hub, by its commit, whatever its branch comes to.
    commit = "0123456789abcdef0123456789abcdef01234567"
    adapter_base.note_revision(
        model, [f"/hub/models--some--model/snapshots/{commit}/model.safetensors"]
    )
    found = adapter_base.entry(config, model, "0" * 32)
    assert found.revision == commit
    again = adapter_base.as_it_was(from_tree(quantised_tree(strategy={"kind": "ddp"})), found)
    assert isinstance(again.model, PretrainedModel)
    assert again.model.revision == commit


def test_a_weight_of_a_base_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(directory)
    built, values = values_of("llama", directory)
    state = {
        name: adapter_base.OfBase(tuple(p.shape), torch.float32, (), values[name])
        for name, p in built.named_parameters()
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name].whole(), parameter)


# --- a checkpoint, and what is made of it ---------------------------------------------------------


def written(model: PreTrainedModel, base_directory: Path, path: Path) -> Path:
    """Write a checkpoint of one rank after a step, as a run does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    trainer: Any = SimpleNamespace(
        model=model,
        torch_optimizer=lambda: optimizer,
        args=SimpleNamespace(process_index=0, world_size=1),
        config=SimpleNamespace(
            model=PretrainedModel(kind="pretrained", name=str(base_directory)), seed=0
        ),
    )
    path.mkdir()
    folder = HashedFolder(path)
    state = DistributedState(trainer, Plans(), into=None)
    state.finish(folder, [state.write(folder)])
    for name, text in config_texts(model, {}).items():
        folder.write(name, text)
    described = {
        "step": 1,
        "finite": True,
        "parameters": save._parameters(trainer),
        **save._described_adapter(trainer),
        **save._described_base(trainer),
        "files": folder.files,
    }
    layout.write_manifest(path, described)
    return path


@pytest.mark.parametrize(("name", "bits"), [("llama", "4bit"), ("gpt2", "8bit")])
def test_a_checkpoint_holds_the_adapter_alone_and_whole_weights_come_of_it(
    name: str, bits: str, tmp_path: Path
) -> None:
    directory = adapters.saved(name, tmp_path / "base")
    model, values = filled(name, directory, bits)
    checkpoint = written(model, directory, tmp_path / "checkpoint-1")
    state, manifest = portable.read(checkpoint), layout.read_manifest(checkpoint)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert state.weights.keys() == state.moments.keys() == trained.keys()
    assert {p.name for p in manifest.parameters} == {n for n, _ in model.named_parameters()}
    assert manifest.base is not None
    assert (manifest.base.name, manifest.base.digest) == (
        str(directory),
        quantised.digest_of(model),
    )

    # Resumed, the model has the same bits.
    again, _ = adapters.injected(name, directory, LORA)
    of = saved.Saved(checkpoint, state, (), "cannot be read: {error}")
    quantiser = quantised.Quantiser(again, bits, torch.float32, "cpu")
    found = saved.first_values(again, of, values)
    materialize(again, found, torch.float32, "cpu", quantiser.take)
    quantiser.finish(again)
    for (key, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), key

    # Recovered, it is what peft makes of the base and of the adapter alone.
    out, told = tmp_path / "out", io.StringIO()
    recover(Options(source=checkpoint, out=out), told, told)
    recover(Options(source=checkpoint, out=tmp_path / "adapter", adapter=True), told, told)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(out)
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[key], tensor, atol=1e-6, rtol=1e-5)

    # And another run can begin with it.
    built, first = saved.of_another_run(lambda: type(plain)(plain.config), checkpoint, 0)
    materialize(built, first, torch.float32, "cpu")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(built.state_dict()[key], tensor), key

    moved = directory.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="or --adapter to take the adapter alone"):
        recover(Options(source=checkpoint, out=tmp_path / "a"), told, told)
    recover(Options(source=checkpoint, out=tmp_path / "b", base=moved), told, told)
    files = [(place / "model.safetensors").read_bytes() for place in (out, tmp_path / "b")]
    assert files[0] == files[1]
    asked = Options(source=checkpoint, out=tmp_path / "c", adapter=True, base=moved)
    with pytest.raises(UserError) as refused:
        recover(asked, told, told)
    assert str(refused.value) == (
        f"--adapter reads nothing of --base={moved}; leave one of them out"
    )


def test_a_base_is_asked_for_in_vain_where_a_checkpoint_is_whole(tmp_path: Path) -> None:
    directory = adapters.saved("llama", tmp_path / "base")
    model, values = adapters.injected("llama", directory, LORA)
    materialize(model, values, torch.float32, "cpu")
    checkpoint = written(model, directory, tmp_path / "checkpoint-1")
    assert layout.read_manifest(checkpoint).base is None
    told = io.StringIO()
    with pytest.raises(UserError) as refused:
        recover(Options(source=checkpoint, out=tmp_path / "a", base=directory), told, told)
    assert str(refused.value) == (
        f"--base: {checkpoint} holds all weights and reads none of {directory}; leave it out"
    )


@pytest.mark.parametrize("bits", BITS)
def test_a_model_that_is_moved_to_where_it_is_stays_as_it_is(bits: str, tmp_path: Path) -> None:
    filled_one, _ = filled("llama", adapters.saved("llama", tmp_path / "base"), bits)
    model: Any = filled_one
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = model.to("cpu").train()(ids).logits
    assert torch.equal(before, after)


def test_a_header_and_a_card_say_what_the_adapter_is_beside() -> None:
    config = from_tree(quantised_tree(strategy={"kind": "ddp"}))
    assert messages._adapter(config) == "lora, rank 8, alpha 16, beside weights in 4 bits"
    assert messages._adapter(from_tree(adapters.PRETRAINED)) == "lora, rank 8, alpha 16"
    facts: Any = SimpleNamespace(trained=7)
    assert card_text._adapter(facts, config) == (
        "LoRA of rank 8, alpha 16 (7 parameters), trained beside weights in 4 bits, merged into "
        "them as they were before"
    )
