"""Parts of the user's own are found, imported and tried; what does not fit is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.launchers import own_parts as of_launcher
from shardwright.train import own_parts, own_trial
from shardwright.train.config import from_tree
from shardwright.train.config.own import same_part, with_parts_located
from shardwright.train.errors import UserError
from shardwright.train.loop.callbacks import own
from shardwright.train.loop.callbacks.own import OwnCallbacks
from shardwright.train.model.loss_terms import IGNORED, summed
from shardwright.train.model.own_loss import OwnLoss
from shardwright.train.optimizer import custom
from shardwright.train.optimizer.trial import State
from tests.unit.constants import ROOT
from tests.unit.optimizers import config
from tests.unit.trees import TREE

PARTS = f"{ROOT}/tests/example_parts.py"
CALLBACK = "trainer.callbacks"


def text_of(tmp_path: Path, code: str, name: str = "Own") -> str:
    """Return the text that names a part of a new file."""
    path = tmp_path / f"parts{len(list(tmp_path.iterdir()))}.py"
    path.write_text(code)
    return f"{path}:{name}"


# --- where a part is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own.py", "trainer.callbacks=own.py names no function or class; say file.py:NAME or pack"),
        ("own.py:a b", "names no function or class"),
        (":Own", "names no function or class"),
        ("nowhere/own.py:Own", "nowhere/own.py is not there; give the path of a Python file"),
        ("no.such.module:Own", "there is no module no.such.module; install it, set PYTHONPATH"),
        ("json.nothing:Own", "there is no module json.nothing"),
        (f"{PARTS}:Counted", "example_parts.py has no Counted; name a function or class of it"),
    ],
)
def test_what_is_not_there_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        own_parts.check(CALLBACK, text)
    assert message in str(error.value)
    assert text in str(error.value)


def test_parts_are_found_in_files_and_modules_without_their_import() -> None:
    before = set(sys.modules)
    own_parts.check(CALLBACK, f"{PARTS}:Counting")
    own_parts.check(CALLBACK, "wsgiref.simple_server:WSGIServer")
    assert "wsgiref" not in set(sys.modules) - before


def test_a_file_is_imported_once_and_what_lies_beside_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "beside_of_own_parts.py").write_text("VALUE = 7\n")
    code = "from beside_of_own_parts import VALUE\nMADE = []\ndef Own():\n    return MADE, VALUE\n"
    text = text_of(tmp_path, code)
    first, second = own_parts.load(CALLBACK, text), own_parts.load(CALLBACK, text)
    assert first is second
    assert first() == ([], 7)
    sys.path.remove(str(tmp_path))


def test_what_an_import_raises_is_said_with_its_place(tmp_path: Path) -> None:
    text = text_of(tmp_path, "import torch\nOwn = 1 / 0\n")
    with pytest.raises(UserError, match=r"parts0.py:Own: it cannot be imported: ZeroDivisionError"):
        own_parts.load(CALLBACK, text)
    text = text_of(tmp_path, "Own = 5\n")
    with pytest.raises(UserError, match=r"Own is int, and is not called"):
        own_parts.load(CALLBACK, text)


def test_a_part_keeps_its_meaning_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def loss(): ...\n")
    monkeypatch.chdir(tmp_path)
    tree = {**TREE, "objective": {"kind": "clm", "loss": "mine:loss"}}
    tree["trainer"] = {**TREE["trainer"], "callbacks": ["mine.py:Own", "json:JSONDecoder"]}
    found = with_parts_located(from_tree(tree))
    assert found.objective.loss == f"{tmp_path}/mine.py:loss"
    assert found.trainer.callbacks == (f"{tmp_path}/mine.py:Own", "json:JSONDecoder")
    monkeypatch.chdir(os.sep)
    assert with_parts_located(found) == found


def test_the_same_part_may_lie_elsewhere() -> None:
    assert same_part("/a/own.py:Lamb", "package.own:Lamb")
    assert not same_part("/a/own.py:Lamb", "/a/own.py:Lion")
    assert not same_part(None, "/a/own.py:Lion")


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "objective", "message"),
    [
        ({"optimizer": "custom"}, {}, "takes a class of your own, but custom_class=null; set cust"),
        ({"callbacks": ["a.py"]}, {}, "callbacks=a.py names no function or class"),
        ({"callbacks": ["a.py:B"] * 2}, {}, "callbacks has a.py:B twice"),
        ({}, {"loss": "a.py"}, "loss=a.py names no function or class"),
        ({}, {"loss": "a.py:b", "z_loss": 0.1}, "z_loss=0.1 changes the cross entropy, in whose"),
        ({"fused_loss": True}, {"loss": "a.py:b"}, "never has all logits at once, which objective"),
    ],
)
def test_what_contradicts_itself_is_refused(
    trainer: dict[str, Any], objective: dict[str, Any], message: str
) -> None:
    tree = {**TREE, "trainer": {**TREE["trainer"], **trainer}}
    tree["objective"] = {**TREE["objective"], **objective}
    with pytest.raises(UserError) as error:
        from_tree(tree)
    assert message in str(error.value)


def test_the_metric_of_an_own_loss_needs_one() -> None:
    tree = {**TREE, "checkpoint": {"best_metric": "eval_own_loss"}}
    with pytest.raises(UserError, match="is measured with objective.loss, which is null"):
        from_tree(tree)


# --- a loss ---------------------------------------------------------------------------------------


def test_a_loss_gets_positions_with_a_label_and_is_summed() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    labels = torch.tensor([[1, IGNORED, 0], [6, 2, IGNORED]])
    found = OwnLoss(f"{PARTS}:entropy").summed(logits, labels)
    torch.testing.assert_close(found, summed(logits.flatten(0, 1), labels.flatten()))
    nothing = OwnLoss(f"{PARTS}:entropy").summed(logits, torch.full((2, 3), IGNORED))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("logits.logsumexp(-1).mean()", r"it returned \(\) for labels of shape \(4,\); it is to"),
        ("5.0", "it returned float for labels of shape"),
        ("logits.argmax(-1)", "a loss is a floating-point number"),
        ("logits.detach().logsumexp(-1)", "has no gradient with respect to the logits"),
        ("logits.nothing()", "AttributeError: 'Tensor' object has no attribute 'nothing'"),
    ],
)
def test_what_is_no_loss_is_refused(tmp_path: Path, code: str, message: str) -> None:
    text = text_of(tmp_path, f"def Own(logits, labels):\n    return {code}\n")
    with pytest.raises(UserError, match=message) as error:
        OwnLoss(text).tried()
    assert f"objective.loss={text}" in str(error.value)


# --- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Misspelt",
            r"has on_steps_end, which is no event of a training: did you mean on_step_end",
        ),
        ("Demanding", r"made without arguments, but: missing a required argument: 'needed'"),
        ("SignMomentum", "is no subclass of transformers.TrainerCallback"),
    ],
)
def test_what_is_no_callback_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        own.made(f"{PARTS}:{name}")
    assert f"trainer.callbacks={PARTS}:{name}" in str(error.value)


def test_a_function_may_make_a_callback(tmp_path: Path) -> None:
    code = "from transformers import TrainerCallback\ndef Own():\n    return TrainerCallback()\n"
    own.made(text_of(tmp_path, code))
    with pytest.raises(UserError, match="it gives int, and is to give a transformers"):
        own.made(text_of(tmp_path, "def Own():\n    return 5\n"))


def test_the_state_of_callbacks_survives_also_where_their_file_has_moved(tmp_path: Path) -> None:
    texts = [f"{PARTS}:Counting", f"{PARTS}:Exported"]
    before = OwnCallbacks(texts)
    counting, exported = before.made.values()
    counting.steps, exported.logs = 5, 7  # type: ignore[attr-defined]
    for name, content in before.files().items():
        (tmp_path / name).write_text(content.replace(str(ROOT), "/elsewhere"))
    counting, exported = OwnCallbacks(texts, tmp_path).made.values()
    assert counting.steps == 5  # type: ignore[attr-defined]
    assert exported.logs == 7  # type: ignore[attr-defined]
    assert OwnCallbacks([], tmp_path).files() == {}


def test_a_state_that_is_not_json_is_refused(tmp_path: Path) -> None:
    text = text_of(
        tmp_path,
        "from transformers import TrainerCallback\nclass Own(TrainerCallback):\n"
        "    def state_dict(self):\n        return {'all': {1, 2}}\n",
    )
    with pytest.raises(RuntimeError, match=r"Own: its state cannot be saved as JSON \(.*set is no"):
        OwnCallbacks([text]).files()


# --- an optimizer ---------------------------------------------------------------------------------

HEAD = """
import torch
class Own(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.count = 0
    @torch.no_grad()
    def step(self):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state, lr = self.state[p], group["lr"]
"""


def checked(strategy: dict[str, Any] | None = None, **trainer: Any) -> State:
    tree = config(optimizer="custom", **trainer).model_dump(mode="json")
    return custom.check(from_tree({**tree, "strategy": strategy or {"kind": "ddp"}}))


def test_an_optimizer_that_fits_says_what_it_keeps() -> None:
    found = checked(
        {"kind": "zero", "stage": 3}, custom_class=f"{PARTS}:SignMomentum", custom_moments=1
    )
    assert found == State(frozenset({"mean"}), frozenset({"step"}))
    # torch's own are classes like any other.
    found = checked(custom_class="torch.optim:RAdam", custom_options={"eps": 1e-6})
    assert found.moments == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "2 steps with lr=0.0006 leave parameters as they are"),
        ("p.sub_(lr * p.grad)", "keeps 0 tensors of each parameter .none., but trainer.custom_mom"),
        (
            "state['m'] = torch.zeros(3); p.sub_(lr)",
            r"keeps m, Tensor of shape \(3,\), of a parame",
        ),
        ("state['m'] = [1]; p.sub_(lr)", r"keeps m, list, of a parameter"),
        (
            "state['m'] = p.grad.clone(); p.sub_(lr * p.grad * self.count)",
            "depends on more than the state of each parameter",
        ),
        (
            "state['m'] = p.grad.clone(); p.sub_(1e-3 * p.grad)",
            "though the lr of their groups is 0",
        ),
        ("state['m'] = p.grad.clone(); p.nothing()", "its step failed in a trial of two small"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(tmp_path: Path, body: str, message: str) -> None:
    text = text_of(tmp_path, f"{HEAD}                {body}\n")
    with pytest.raises(UserError, match=message) as error:
        checked(custom_class=text, custom_moments=1)
    assert f"trainer.custom_class={text}" in str(error.value)


def test_one_that_needs_whole_tensors_is_refused_under_zero_alone() -> None:
    own_class: dict[str, Any] = {
        "custom_class": f"{PARTS}:NormedMomentum",
        "custom_moments": 1,
    }
    checked(**own_class)
    checked({"kind": "zero", "stage": 0}, **own_class)
    with pytest.raises(UserError, match="does not update each element of a matrix by itself"):
        checked({"kind": "zero", "stage": 2}, **own_class)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"custom_class": "json:JSONDecoder"},
            "it cannot be made of groups of parameters and lr: ",
        ),
        ({"custom_options": {"gamma": 1}}, r"and lr, gamma: TypeError: .*gamma"),
        ({"custom_class": "collections:Counter"}, "it cannot be made|is to give a torch.optim"),
        (
            {"custom_class": "torch.optim:Adagrad", "custom_moments": 1},
            "it keeps state of its parameters before its first step, and ZeRO puts others",
        ),
        (
            {"custom_class": "torch.optim:Rprop", "weight_decay": 0.1},
            "has no setting weight_decay, but trainer.weight_decay=0.1; set trainer.weight_decay=0",
        ),
    ],
)
def test_what_makes_no_optimizer_is_refused(trainer: dict[str, Any], message: str) -> None:
    given = {"custom_class": f"{PARTS}:SignMomentum", "custom_moments": 1, **trainer}
    with pytest.raises(UserError, match=message):
        checked({"kind": "zero", "stage": 1}, **given)


def test_a_state_of_other_code_is_not_taken() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    custom.check_state(optimizer, "h.weight", ["anything"])
    vars(optimizer)[custom.NAMED_BY] = "own.py:Own"
    vars(optimizer)[custom.KEEPS] = State(frozenset({"mean"}), frozenset())
    custom.check_state(optimizer, "h.weight", ["mean"])
    with pytest.raises(UserError, match=r"keeps mean of each parameter, but .* has exp_avg of h.w"):
        custom.check_state(optimizer, "h.weight", ["exp_avg"])


# --- before a run ---------------------------------------------------------------------------------


def test_the_launcher_has_a_child_try_them(tmp_path: Path) -> None:
    tree = config(
        optimizer="custom",
        custom_class=f"{PARTS}:NormedMomentum",
        custom_moments=1,
        callbacks=[f"{PARTS}:Misspelt", f"{PARTS}:Counting"],
    ).model_dump(mode="json")
    whole_tensors = text_of(
        tmp_path,
        f"{HEAD}                state['m'] = p.grad.clone(); p.sub_(lr * torch.ones(p.shape))\n",
    )
    tree["objective"]["loss"] = f"{PARTS}:focal"
    tree["strategy"] = {"kind": "zero", "stage": 1}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    named = {"kind": "from_config", "name": str(tmp_path / "model"), "vocab_size": 512}
    tree["model"] = {**named, "overrides": {"n_layers_": 3}}
    found = list(of_launcher.problems(from_tree(tree)))
    assert [text.partition(":")[0] for text in found] == [
        f"trainer.callbacks={ROOT}/tests/example_parts.py",
        f"trainer.custom_class={ROOT}/tests/example_parts.py",
        "unknown key model.overrides.n_layers_",
    ]
    begun = {**tree, "model": named, "run_dir": str(tmp_path)}
    assert not of_launcher._is_model_to_try(from_tree(begun)), "it takes its config as it is"
    begun["model"] = tree["model"]
    assert of_launcher._is_model_to_try(from_tree(begun))
    (tmp_path / "config.yaml").touch()
    assert not of_launcher._is_model_to_try(from_tree(begun)), "it was looked at where it began"
    tree["model"] = config().model_dump(mode="json")["model"]
    tree["trainer"] |= {"callbacks": [], "custom_class": whole_tensors}
    tree["strategy"] = {"kind": "fsdp"}
    (text,) = own_trial.problems(from_tree(tree))
    assert "its step does not work on the sharded tensors of strategy=fsdp" in text
    tree["trainer"]["callbacks"] = ["gone.py:Own"]
    (text,) = of_launcher.problems(from_tree(tree))
    assert text.startswith("trainer.callbacks=gone.py:Own: ")


def test_an_optimizer_that_cannot_be_made_is_said_once_whatever_the_engine() -> None:
    tree = config(
        optimizer="custom", custom_class=f"{PARTS}:SignMomentum", custom_options={"gamma": 1}
    ).model_dump(mode="json")
    for kind in ("ddp", "fsdp"):
        (text,) = own_trial.problems(from_tree({**tree, "strategy": {"kind": kind}}))
        assert "it cannot be made of groups of parameters and lr, gamma: " in text
        assert "sharded" not in text
