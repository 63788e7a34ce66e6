"""Which parameter is updated by what, and that one optimizer does what its parts would do."""

from __future__ import annotations

import copy
import sys
import typing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers import (
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.config.optimizers import OPTIMIZERS, OptimizerName
from shardwright.train.errors import UserError
from shardwright.train.optimizer.build import KINDS, asked, asked_class, class_of, found
from shardwright.train.optimizer.muon import MuonWithAdamW, hidden_matrices
from tests.unit.constants import ROOT, files_with
from tests.unit.optimizers import built, config, decayed, give_gradients, gpt2

SIGN_MOMENTUM = f"{ROOT}/tests/example_parts.py:SignMomentum"


def roberta() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return RobertaForMaskedLM(sizes)


def only(name: str) -> dict[str, Any]:
    """Return an optimizer and what it cannot do without."""
    averages = OPTIMIZERS[cast("OptimizerName", name)].averages_itself
    return {"optimizer": name, **({"lr_scheduler": "constant"} if averages else {})}


def names_in(group: dict[str, Any], model: nn.Module) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize(
    "name", ["adamw", "adafactor", "muon", "adamw_8bit", "lion", "sgd", "schedule_free"]
)
@pytest.mark.parametrize("make", [gpt2, roberta])
def test_each_parameter_is_in_one_group_and_biases_and_norms_do_not_decay(
    make: Any, name: str
) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("torchao.optim")
    model = make()
    groups = built(model, **only(name), weight_decay=0.1).param_groups
    found = [n for group in groups for n in names_in(group, model)]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters())
    for group in groups:
        assert float(group["lr"]) == pytest.approx(6e-4)
        for n in names_in(group, model):
            spared = n.endswith("bias") or "ln_" in n or "LayerNorm" in n or "layer_norm" in n
            assert group["weight_decay"] == (0.0 if spared else 0.1), n


def test_muon_gets_the_matrices_between_hidden_layers() -> None:
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"transformer.h.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert hidden_matrices(gpt2()) == expected

    kinds = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    expected = {f"roberta.encoder.layer.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert hidden_matrices(roberta()) == {*expected, "lm_head.dense.weight"}


def test_an_untied_head_is_left_to_adamw() -> None:
    model = gpt2(tied=False)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert "lm_head.weight" not in hidden_matrices(model)


def test_muon_and_adamw_together_are_torchs_own_one_by_one() -> None:
    ours, theirs = roberta(), roberta()
    matrices, decay = hidden_matrices(theirs), decayed(theirs)
    optimizer = built(ours, optimizer="muon", muon_momentum=0.9, weight_decay=0.1)
    assert isinstance(optimizer, MuonWithAdamW)
    named = dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [named[n] for n in sorted(matrices)],
        lr=6e-4,
        momentum=0.9,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = set(named) - matrices
    adamw = torch.optim.AdamW(
        [
            {"params": [named[n] for n in sorted(rest & decay)], "weight_decay": 0.1},
            {"params": [named[n] for n in sorted(rest - decay)], "weight_decay": 0.0},
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    for seed in range(3):
        for model in (ours, theirs):
            give_gradients(model, seed)
        for part in (optimizer, muon, adamw):
            part.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["adafactor", "muon", "lion", "sgd", "schedule_free"])
def test_a_loaded_state_goes_on_bit_for_bit(name: str) -> None:
    model = roberta()
    optimizer = built(model, **only(name))
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = built(other, **only(name))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for stepped, with_optimizer in ((model, optimizer), (other, resumed)):
        give_gradients(stepped, 2)
        with_optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_schedule_reaches_both_parts_of_muon() -> None:
    model = roberta()
    optimizer = built(model, optimizer="muon", weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    assert all(group["initial_lr"] == 6e-4 for group in optimizer.param_groups)
    give_gradients(model, 0)
    optimizer.step()
    scheduler.step()
    before = copy.deepcopy(model)
    optimizer.step()
    for one, two in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_matrices_may_have_a_rate_of_their_own_and_the_logged_one_is_adamws() -> None:
    settings = {"learning_rate": 1e-3, "muon_learning_rate": 0.02}
    groups = built(
        roberta(), optimizer="muon", muon_learning_rate_scale="original", **settings
    ).param_groups
    assert [(g["algorithm"], g["lr"]) for g in groups] == [
        ("adamw", 1e-3),
        ("adamw", 1e-3),
        ("muon", 0.02),
    ]


def test_updates_of_muon_have_the_rms_of_adamws() -> None:
    model = roberta()
    before = copy.deepcopy(model)
    give_gradients(model, 0)
    built(model, optimizer="muon", learning_rate=1.0, weight_decay=0.0).step()
    name = "roberta.encoder.layer.0.intermediate.dense.weight"
    update = (model.get_parameter(name) - before.get_parameter(name)).detach()
    # 0.2 to 0.4 is what AdamW's have, says arXiv 2502.16982, section 2.2.
    assert 0.15 < float(update.square().mean().sqrt()) < 0.3


def test_original_scale_is_refused_where_matrices_are_stored_the_other_way_round() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel stores them the other way round; set tr"):
        built(gpt2(), optimizer="muon", muon_learning_rate_scale="original")
    built(roberta(), optimizer="muon", muon_learning_rate_scale="original")


def test_schedule_free_is_its_librarys_own_also_where_groups_are_stepped_one_by_one() -> None:
    """As stage 3 does, with the parameters of one group at a time; and so is what is learned."""
    ours, theirs = roberta(), roberta()
    optimizer = built(ours, optimizer="schedule_free", lr_scheduler="constant", weight_decay=0.1)
    decay, named = decayed(theirs), dict(theirs.named_parameters())
    expected = AdamWScheduleFree(
        [
            {"params": [p for n, p in named.items() if n in decay], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decay], "weight_decay": 0.0},
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
    )
    expected.train()
    held = [group["params"] for group in optimizer.param_groups]
    for seed in range(4):
        rate = 6e-4 * min(1.0, (seed + 1) / 3)  # a warm-up
        for group in [*optimizer.param_groups, *expected.param_groups]:
            group["lr"] = rate
        for model in (ours, theirs):
            give_gradients(model, seed)
        expected.step()
        for stepped in range(len(held)):
            for number, group in enumerate(optimizer.param_groups):
                group["params"] = held[number] if number == stepped else []
            optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-6, atol=1e-7, msg=name)
    learned = KINDS["schedule_free"].learned
    assert learned is not None
    trainer = config(optimizer="schedule_free", lr_scheduler="constant").trainer
    made = {
        name: learned.of(trainer)(p.detach(), optimizer.state[p][learned.moment])
        for name, p in ours.named_parameters()
    }
    expected.eval()
    for name, parameter in named.items():
        torch.testing.assert_close(made[name], parameter.detach(), rtol=1e-6, atol=1e-7, msg=name)
    assert not torch.equal(made["lm_head.bias"], ours.get_parameter("lm_head.bias"))


def test_schedule_free_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match="needs the package schedulefree, .* `pip install sched"):
        built(gpt2(), optimizer="schedule_free", lr_scheduler="constant")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"lr_scheduler": "cosine"},
            "needs no schedule, of which its average takes the place, but lr_scheduler=cosine; "
            "set lr_scheduler=constant",
        ),
        (
            {"lr_scheduler": "constant", "adam_beta1": 0.0},
            "adam_beta1=0 has optimizer=schedule_free take gradients at its fast weights",
        ),
        (
            {"lr_scheduler": "constant", "average_weights": "ema"},
            "keeps an average of the weights itself, which is what is evaluated and exported, but "
            "trainer.average_weights=ema; set it to null",
        ),
    ],
)
def test_what_schedule_free_does_not_go_with_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="schedule_free") as refused:
        config(optimizer="schedule_free", **values)
    assert said in str(refused.value)


def test_adafactor_leaves_rows_without_a_gradient_alone() -> None:
    model = gpt2()
    optimizer = built(model, optimizer="adafactor", weight_decay=0.0)
    embedding = model.get_parameter("transformer.wte.weight")
    before = embedding.detach().clone()
    give_gradients(model, 0)
    assert embedding.grad is not None
    embedding.grad[5:] = 0.0
    embedding.grad[:5] *= 1e-9  # so small that its square is far below fp32's epsilon
    optimizer.step()
    assert torch.equal(embedding[5:], before[5:])
    assert (embedding[:5] - before[:5]).abs().mean() > 1e-6
    assert all(p.isfinite().all() for p in model.parameters())


def test_adamw_8bit_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="needs the package torchao, .* `pip install torchao`"):
        built(gpt2(), optimizer="adamw_8bit")


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw"}))
def test_an_optimizer_is_known_by_name_in_its_registries_and_its_module_alone(
    name: OptimizerName,
) -> None:
    found = files_with(name)
    module = (
        Path(str(sys.modules[KINDS[name].build.__module__].__file__)).resolve().relative_to(ROOT)
    )
    registries = {"train/config/optimizers.py", "train/optimizer/build.py"}
    # What they call their settings.
    of_other_programs = {
        "train/config/messages.py",
        "launchers/translating/deepspeed_json.py",
        "launchers/translating/trainer_line.py",
    }
    assert registries <= found <= {*registries, str(module)} | of_other_programs


def test_the_registries_hold_the_same_optimizers() -> None:
    assert set(OPTIMIZERS) == set(KINDS) == set(typing.get_args(OptimizerName))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_built_is_read_back_as_it_was_asked_for(name: OptimizerName) -> None:
    if (package := OPTIMIZERS[name].package) is not None:
        pytest.importorskip(package)
    of_adam = {"adam_epsilon": 1e-6} if OPTIMIZERS[name].runs_adamw else {}
    own: dict[str, dict[str, Any]] = {
        "muon": {"muon_momentum": 0.9, "muon_learning_rate": 0.02},
        "lion": {"lion_beta1": 0.8},
        "schedule_free": {"lr_scheduler": "constant"},
        "sgd": {"sgd_momentum": 0.8, "sgd_nesterov": True},
        "custom": {"custom_class": SIGN_MOMENTUM, "custom_moments": 1},
    }
    given: dict[str, Any] = {"learning_rate": 3e-4, **of_adam, **own.get(name, {})}
    optimizer = built(roberta(), optimizer=name, **given)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)  # notes the peak rates
    class_name = class_of(optimizer)
    assert class_name == asked_class(config(optimizer=name, **given))
    live = dict(found(class_name, group) for group in optimizer.param_groups)
    assert live == asked(config(optimizer=name, **given))
    other = asked(config(optimizer=name, **{**given, "learning_rate": 4e-4}))
    assert live != other
