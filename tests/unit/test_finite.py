"""What lets an optimizer step, what is asked of the weights, and what is said of a divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwright.train.checkpoint import retention
from shardwright.train.checkpoint.choose import choose
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.lazy import Fragment, LazyTensor, has_only_finite
from shardwright.train.config import CheckpointConfig
from shardwright.train.config.precision import DTYPES
from shardwright.train.errors import UserError
from shardwright.train.loop.divergence import Found, diagnosis, message
from shardwright.train.loop.trainer import IGNORED, Trainer
from shardwright.train.model import loss_terms
from shardwright.train.strategy.finite import Gate, Numbers, are_sound
from tests.checkpoints import write_checkpoint
from tests.unit.optimizers import built, give_gradients, gpt2

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


# --- the gate ------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The gate stands before what torchao compiles, for each shape, in half a minute of a core."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "adamw_8bit", "lion", "sgd"])
def test_no_optimizer_steps_while_the_gate_is_closed(name: str, uncompiled: None) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("torchao.optim")
    model, gate = gpt2(), Gate(CPU)
    optimizer = built(model, optimizer=name, learning_rate=0.1)
    gate.guard(optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for bad in (NAN, INF):
        give_gradients(model, 0)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = bad
        gate.judge(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))  # type: ignore[misc]
        optimizer.step()
        for n, parameter in model.named_parameters():
            assert torch.equal(parameter, before[n]), n
    give_gradients(model, 0)
    gate.judge(torch.tensor(1.0))
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_open_gate_changes_no_bit(name: str) -> None:
    weights = []
    for is_guarded in (True, False):
        model = gpt2()
        optimizer = built(model, optimizer=name, learning_rate=0.1)
        if is_guarded:
            Gate(CPU).guard(optimizer)
        for seed in range(3):
            give_gradients(model, seed)
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_infinite_loss_with_finite_gradients_spoils_them_and_keeps_its_value() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = -INF
    logits.requires_grad_()
    labels = torch.tensor([[1, IGNORED]])
    plain = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad(plain, logits)
    assert plain.isinf()
    assert gradient.isfinite().all()

    trainer: Any = SimpleNamespace(
        loss=Trainer.loss,
        _terms=loss_terms.NONE,
        _weighting=loss_terms.EQUAL,
        _own_loss=None,
        auxiliary_loss=None,
        _check_head=lambda logits, labels: None,
    )
    outputs = SimpleNamespace(logits=logits)
    loss = Trainer._step_loss(trainer, outputs, labels, torch.tensor(1))
    loss *= 2  # as the Trainer does by the number of ranks
    assert loss.isinf()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0].isnan().all()


def not_finite(gate: Gate) -> list[int]:
    gate.conclude(1)
    newest = gate.newest_known()
    assert newest is not None
    return newest.not_finite


def test_a_norm_that_is_not_finite_is_normal_while_losses_are_scaled() -> None:
    gate = Gate(CPU)
    for is_bad in (False, torch.tensor(False)):
        gate.judge(INF, is_bad=is_bad)
        assert not_finite(gate) == [0, 0]
    gate.judge(INF, is_bad=torch.tensor(True))
    assert not_finite(gate) == [0, 1]


def test_a_loss_of_any_micro_batch_counts_until_the_next_step() -> None:
    gate = Gate(CPU)
    for loss in (1.0, NAN, 2.0):
        gate.add_loss(torch.tensor(loss))
    assert not_finite(gate) == [1, 0]
    gate.begin()
    gate.add_loss(torch.tensor(1.0))
    assert not_finite(gate) == [0, 0]


def test_the_numbers_of_a_step_outlast_the_next_ones_begin() -> None:
    gate = Gate(CPU)
    assert gate.newest_known() is None
    for step, loss in ((1, 2.0), (2, INF), (3, 1.0)):
        gate.begin()
        gate.add_loss(torch.tensor(loss))
        gate.judge(float(step))
        gate.conclude(step)
        assert gate.newest_known() == Numbers(step, loss, float(step))
    assert gate.last() == [Numbers(2, INF, 2.0), Numbers(3, 1.0, 3.0)]
    gate.begin()
    assert gate.last()[1].loss == 1.0


def test_beside_a_gpu_the_step_before_is_known_while_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gate = Gate(CPU)
    gate._on_host = torch.zeros(2, 2)
    for step in range(1, 5):
        gate.begin()
        gate.add_loss(torch.tensor(float(step)))
        gate.judge(10.0 * step)
        gate.conclude(step)
        before = Numbers(step - 1, step - 1.0, 10.0 * (step - 1))
        assert gate.newest_known() == (before if step > 1 else None)
        assert gate.last()[-1] == Numbers(step, float(step), 10.0 * step)
        waited.pop()  # for the last, of which a save asks
        assert set(waited) <= {step - 1}
        waited.clear()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_element_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.ones(100, dtype=dtype), torch.empty(0, dtype=dtype), torch.ones(3, 50).T]
    assert are_sound(tensors, CPU, 2.0**64)
    for tensor in tensors:
        if tensor.numel():
            tensor.reshape(-1)[7] = 1.0
            tensor[tensor.shape[0] - 1] = bad
            assert not are_sound(tensors, CPU, 2.0**64)
            tensor[tensor.shape[0] - 1] = 1.0
    assert are_sound([], CPU, 1.0)


@pytest.mark.parametrize(
    ("dtype", "sound", "too_large"),
    [("fp32", 1e19, 2e19), ("bf16", 1e19, 2e19), ("fp16", 6e4, 7e4)],
)
def test_weights_whose_products_overflow_are_not_sound(
    dtype: str, sound: float, too_large: float
) -> None:
    weights = torch.ones(9)
    for value, expected in ((sound, True), (-sound, True), (too_large, False), (-too_large, False)):
        weights[4] = value
        assert are_sound([weights], CPU, DTYPES[dtype].largest_weight).item() is expected


# --- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([Found(NAN, 1.0, True)], "the loss is NaN"),
        ([Found(1.0, 1.0, True), Found(INF, NAN, True)], "the loss is inf on rank 1"),
        ([Found(NAN, NAN, True), Found(INF, NAN, True)], "the loss is NaN on every rank"),
        (
            [Found(NAN, NAN, True), Found(NAN, NAN, False), Found(1.0, NAN, False)],
            "the loss is NaN on ranks 0, 1, since an update on ranks 1, 2 left weights that are "
            "NaN, infinite or too large to compute with",
        ),
        ([Found(1.0, INF, True)] * 2, "the gradient norm is inf, and the loss is finite"),
        ([Found(1.0, NAN, True)] * 2, "the gradient norm is NaN, and the loss is finite"),
        (
            [Found(1.0, 1.0, False)],
            "its update left weights that are NaN, infinite or too large to compute with",
        ),
    ],
)
def test_what_was_not_finite_is_named(found: list[Found], said: str) -> None:
    assert diagnosis(found) == said


def said(run_dir: Path, step: int, began_at: int | None = None) -> str:
    return message(run_dir, step, [Found(NAN, 1.0, True)], learning_rate=1e-3, began_at=began_at)


def test_the_message_names_the_checkpoint_and_the_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    assert said(run_dir, 3) == (
        "training has diverged at step 3: the loss is NaN. The module in which it began: "
        f"shardwright diagnose '{run_dir}' --replay 3. Nothing had been saved; lower "
        "trainer.learning_rate (it is 0.001) or trainer.max_grad_norm, or warm up for longer, and "
        "start a new run with `shardwright train`"
    )
    for step in (5, 10):
        write_checkpoint(run_dir / "checkpoints", step, finite=True)
    write_checkpoint(run_dir / "checkpoints", 15, finite=False)
    assert said(run_dir, 12, began_at=5) == (
        "training has diverged at step 12: the loss is NaN. The module in which it began: "
        f"shardwright diagnose '{run_dir}' --replay 12. checkpoint-10 is the newest checkpoint,"
        " and its weights are finite; lower trainer.learning_rate (it is 0.001) or "
        "trainer.max_grad_norm, or warm up for longer, and resume with: shardwright resume "
        f"'{run_dir}' trainer.learning_rate=0.0001"
    )
    assert (
        "this was the first step after it, so that it may be beyond repair: if it diverges again, "
        f"delete {run_dir}/checkpoints/checkpoint-10 to resume from checkpoint-5; "
    ) in said(run_dir, 11, began_at=10)


# --- checkpoints ---------------------------------------------------------------------------------


def lazy_tensor(path: Path, values: torch.Tensor) -> LazyTensor:
    path.write_bytes(values.contiguous().view(torch.uint8).numpy().tobytes())
    shape = tuple(values.shape)
    return LazyTensor(shape, values.dtype, (Fragment(path, 0, 0, values.numel()),))


def test_a_tensor_in_files_is_looked_at_to_its_end(tmp_path: Path) -> None:
    values = torch.ones(2**20 + 3)
    assert has_only_finite(lazy_tensor(tmp_path / "a", values))
    assert has_only_finite(lazy_tensor(tmp_path / "b", torch.empty(0)))
    assert has_only_finite(lazy_tensor(tmp_path / "c", torch.tensor([1, 2])))
    values[-1] = NAN
    assert not has_only_finite(lazy_tensor(tmp_path / "d", values))
    assert not has_only_finite(lazy_tensor(tmp_path / "e", values[-2:].bfloat16()))


@pytest.mark.parametrize("rule", [{"keep_last": 1}, {"keep_last": 1, "keep_every_steps": 3}])
def test_what_is_not_finite_keeps_nothing_and_deletes_nothing(
    rule: dict[str, int], tmp_path: Path
) -> None:
    for step, is_finite in ((1, True), (2, True), (3, False), (4, False)):
        write_checkpoint(tmp_path, step, finite=is_finite)
    assert retention.retain(tmp_path, CheckpointConfig(**rule), newest=4) == []  # type: ignore[arg-type]
    assert [step for step, _ in layout.whole_checkpoints(tmp_path)] == [1, 2]
    assert retention.retain(tmp_path, CheckpointConfig(**rule), newest=2) == [1]  # type: ignore[arg-type]
    assert [step for step, _ in layout.whole_checkpoints(tmp_path)] == [2]


def test_a_checkpoint_that_is_not_finite_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    path = write_checkpoint(tmp_path / "checkpoints", 4, finite=False)
    heard: list[Any] = []
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be used: its weights are not fin"):
        choose(path, None, heard.append)
    with pytest.raises(UserError, match=r"no whole checkpoint \(checkpoint-4 cannot be used: its"):
        choose(tmp_path, None, heard.append)
