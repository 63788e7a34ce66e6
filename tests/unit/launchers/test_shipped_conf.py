"""Every shipped option composes and validates, and YAML agrees with train/config/."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from omegaconf import MissingMandatoryValue
from pydantic import BaseModel

from shardwright.launchers.composition.compose import CONF
from shardwright.launchers.composition.quickly import NOT_OF_A_RUN
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import (
    PretrainedModel,
    PretrainedTokenizer,
    RunConfig,
    batch_sizes,
    from_tree,
    messages,
    samples_wanted,
    schedule_of,
    to_yaml,
)
from shardwright.train.config.rules import unread
from shardwright.train.errors import UserError
from shardwright.train.strategy import engine_settings
from tests.unit.launchers.composed import PRESETS, composed
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

EIGHT_GPUS = Machine(compute_capabilities=(9.0,) * 8, cores=64)
CPU = Machine(cores=2)

OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("")
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", *NOT_OF_A_RUN)
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

# What an option needs besides, to be a run.
COMPANIONS = {
    **{
        f"adapter/{kind}": [
            *("model=pretrained", "model.name=some/model"),
            *("tokenizer=pretrained", "tokenizer.name=a/b"),
        ]
        for kind in ("lora", "dora", "ia3")
    },
    "objective/span_corruption": ["model=t5_tiny"],
    "data/hub": ["data.name=someone/something"],
    "data/python": ["data.source=corpus.py:documents"],
    "data/text": ["data.paths=[corpus.txt]"],
    "data/tokens": [
        "data.paths=[corpus.npy]",
        "tokenizer=pretrained",
        "tokenizer.name=some/tokenizer",
    ],
    "model/from_config": ["model.name=some/model", "model.vocab_size=300"],
    "model/pretrained": ["model.name=some/model", "tokenizer=pretrained", "tokenizer.name=a/b"],
    "objective/diffusion": ["model=roberta_tiny"],
    "objective/mlm": ["model=roberta_tiny"],
    "precision/fp8": ["model=llama_tiny"],
    "strategy/zero3_nvme": ["strategy.nvme_path=/disk"],
    "tokenizer/pretrained": ["tokenizer.name=some/tokenizer"],
}
# What the user adds to an experiment, in this order, as its first line shows.
OPEN = {
    "any_architecture": ["model.name"],
    "bert_base_wordpiece": ["data.name"],
    "continued_pretraining": ["model.name", "data.paths", "data.eval_paths"],
    "lora_clm": ["model.name", "data.name"],
    "modernbert_base": ["data.name"],
    "modernbert_base_long": ["model.name", "data.name"],
    "qlora_clm": ["model.name", "data.name"],
}
MASKED = ("bert", "roberta", "modernbert", "kantaibert")


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_composes_and_lists_every_key_with_its_default(option: Path) -> None:
    group = option.parent.name
    overrides = ["data.sequence_length=64", *COMPANIONS.get(str(option), [])]
    if group == "model" and option.name.startswith(MASKED):
        overrides.append("objective=mlm")
    tree, run = composed(f"{group}={option.name}", *overrides)
    section = getattr(run, group)
    fields = {field.alias or name: field for name, field in type(section).model_fields.items()}
    # So that no override needs a `+`.
    assert set(tree[group]) == set(fields)

    values = yaml.safe_load((CONF / option).with_suffix(".yaml").read_text())
    if group in ("model", "precision", "strategy"):
        return  # options of one class differ in their values, that is what they are for
    for name, field in fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            if isinstance(default, BaseModel):
                default = default.model_dump(mode="json")
            assert_same_unless_chosen(option, name, values[name], default)


def assert_same_unless_chosen(option: Path, name: str, value: object, default: object) -> None:
    if str(option) == "trainer/default" and name == "max_steps":
        assert value is not None  # a run needs a length
    else:
        assert value == default, f"conf/{option}.yaml and train/config/ disagree on {name}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_needs_no_other_setting(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(machine, "detect", lambda environment: EIGHT_GPUS)
    outcome = shardwright("train", "--dry-run", f"model={preset}")
    assert (outcome.code, outcome.err) == (0, "")


def test_a_preset_fits_strategies_and_numbers_of_ranks() -> None:
    presets = [composed(f"model={preset}")[0] for preset in PRESETS]
    for overrides in (
        ["launcher=local", "strategy=single"],
        ["strategy=zero3_offload", "precision=bf16", "launcher.nproc_per_node=4"],
        ["strategy=fsdp_hybrid", "trainer.global_batch_size=24", "launcher.nproc_per_node=8"],
    ):
        others, _ = composed(*overrides)
        changed = {name: others[name] for name in ("launcher", "strategy", "precision", "trainer")}
        for tree in presets:
            run = resolve(from_tree({**tree, **changed}), EIGHT_GPUS, "/runs/a")
            assert run.trainer.global_batch_size % run.trainer.samples_per_pass == 0
            engine_settings(run)  # derives every value of its own


@pytest.mark.parametrize(
    ("overrides", "sequence_length", "micro_batch_size"),
    [
        (["model=gpt2_tiny"], 256, 8),
        (["model=roberta_tiny"], 256, 8),
        (["model=roberta_base"], 512, 8),
        (["model=llama_8b", "launcher.nproc_per_node=8"], 512, 8),
        (["trainer.global_batch_size=8", "launcher.nproc_per_node=2"], 512, 4),
        (["trainer.global_batch_size=21", "launcher.nproc_per_node=3"], 512, 7),
        (["trainer.global_batch_size=26", "launcher.nproc_per_node=2"], 512, 1),
        (["data.sequence_length=64", "trainer.micro_batch_size=32"], 64, 32),
    ],
)
def test_auto_comes_to(overrides: list[str], sequence_length: int, micro_batch_size: int) -> None:
    _, run = composed(*overrides)
    resolved = resolve(run, EIGHT_GPUS if "launcher.nproc" in str(overrides) else CPU, "/runs/a")
    assert resolved.data.sequence_length == sequence_length
    assert resolved.trainer.micro_batch_size == micro_batch_size


def test_a_masked_model_brings_its_objective_unless_another_is_asked_for() -> None:
    assert composed("model=roberta_large")[1].objective.kind == "mlm"
    assert composed("model=roberta_large", "objective.masking_rate=0.3")[1].objective.kind == "mlm"
    with pytest.raises(UserError, match="objective=clm does not fit model.kind=roberta"):
        composed("model=roberta_large", "objective=clm")


def experiment(name: str) -> list[str]:
    values = {"data.paths": "[some/text]", "data.eval_paths": "{held_out: some/text}"}
    given = (f"{key}={values.get(key, 'some/thing')}" for key in OPEN.get(name, []))
    return [f"experiment={name}", *given]


def test_modernbert_is_trained_as_published() -> None:
    _, base = composed(*experiment("modernbert_base"))
    batches, tokens = batch_sizes(base.trainer), 1024
    assert (batches.at(0), batches.at(50_000_000_000 // tokens)) == (768, 4608)
    wanted = samples_wanted(base, None)
    assert wanted is not None
    schedule = schedule_of(base.trainer, wanted)
    assert schedule.warmup_steps * 4608 * tokens == pytest.approx(3e9, rel=0.002)
    assert schedule.share(schedule.total_steps - 1) == 1.0
    # Theirs is not multiplied by the rate, but by its share of the peak.
    assert base.trainer.weight_decay * base.trainer.learning_rate == pytest.approx(1e-5)

    _, long = composed(*experiment("modernbert_base_long"))
    assert isinstance(long.model, PretrainedModel)
    assert isinstance(long.tokenizer, PretrainedTokenizer)
    assert long.tokenizer.name == long.model.name
    assert long.trainer.weight_decay * long.trainer.learning_rate == pytest.approx(1e-5, rel=1e-4)
    wanted = samples_wanted(long, None)
    assert wanted is not None
    schedule = schedule_of(long.trainer, wanted)
    assert schedule(0) == 1.0, "no warm-up"
    a_step = 576 * 8192
    assert schedule.decay_steps * a_step == pytest.approx(50e9, rel=1e-4)
    quarter = schedule.total_steps - schedule.decay_steps * 3 / 4
    assert schedule.share(quarter) == pytest.approx(0.5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_resolves_and_derives(name: str) -> None:
    _, run = composed(*experiment(name))
    resolved = resolve(run, EIGHT_GPUS, "/runs/a")
    assert resolved.name == name
    assert not list(unread.problems(run, resolved))
    # Without ranks there is no engine to set.
    assert engine_settings(resolved) or resolved.strategy.kind == "single"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_first_line_of_an_experiment_runs_it(name: str) -> None:
    first = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[0]
    keys = "".join(f" {key}=..." for key in OPEN.get(name, []))
    assert first == f"# shardwright train experiment={name}{keys}"
    with pytest.raises(MissingMandatoryValue) if keys else nullcontext():
        composed(f"experiment={name}")


def test_overrides_win_over_experiments() -> None:
    _, run = composed("trainer.max_steps=5", "experiment=demo", "strategy=zero3")
    assert run.trainer.max_steps == 5
    assert run.strategy.kind == "zero"
    assert run.strategy.stage == 3


def test_root_keys_match_the_config() -> None:
    tree, _ = composed()
    assert set(tree) == set(RunConfig.model_fields)
    for name in ("name", "run_dir", "sweep_dir", "seed"):
        assert tree[name] == RunConfig.model_fields[name].default


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_survives_config_yaml(name: str) -> None:
    _, run = composed(*experiment(name))
    assert from_tree(yaml.safe_load(to_yaml(run))) == run


def test_a_tokenizers_odd_values_survive_config_yaml() -> None:
    _, run = composed(
        "name=a.b-c", "objective.prompts=['def é:', 'yes', '1e-3', \"it's: #1\"]", "seed=4294967295"
    )
    assert from_tree(yaml.safe_load(to_yaml(run))) == run


@pytest.mark.parametrize("group", messages.OPTIONS)
def test_a_hint_names_every_option_of_a_kind(group: str) -> None:
    by_kind: dict[str, set[str]] = {}
    for path in (CONF / group).glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        while "kind" not in tree:  # an option that builds on another one
            tree = yaml.safe_load((CONF / group / f"{tree['defaults'][0]}.yaml").read_text())
        by_kind.setdefault(tree["kind"], set()).add(path.stem)
    assert {kind: set(options) for kind, options in messages.OPTIONS[group].items()} == by_kind
