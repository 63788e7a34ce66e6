"""By what points can be compared, and what is said where they cannot."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.launchers.sweep import objectives
from shardwright.launchers.sweep.definition import Objective
from shardwright.train.errors import UserError
from tests.unit.launchers.configs import TREE, config


def data(**settings: Any) -> dict[str, Any]:
    return {**TREE["data"], **settings}


@pytest.mark.parametrize(
    ("metric", "sections", "message"),
    [
        ("eval_los", {}, "eval_los is nothing that a run logs; did you mean eval_loss? there are"),
        ("accuracy", {}, "accuracy is nothing that a run logs; "),
        ("val_loss", {}, "did you mean eval_loss? there are eval_loss, eval_perplexity, "),
        (
            "eval_loss",
            {"data": data(eval_fraction=0.0)},
            "eval_loss is told by evaluations, and nothing is held out; set data.eval_fraction",
        ),
        (
            "eval_masked_accuracy",
            {},
            "eval_masked_accuracy is for masked models, and objective=clm; use eval_loss",
        ),
    ],
)
def test_a_metric_that_no_run_logs_is_refused(
    metric: str, sections: dict[str, Any], message: str
) -> None:
    wanted = [Objective(metric=metric)]
    with pytest.raises(UserError) as error:
        objectives.check(wanted, [config(**sections), config(**sections)])
    assert str(error.value).startswith("sweep.objectives: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)  # said once for all points


@pytest.mark.parametrize("metric", ["eval_loss", "eval_loss/wiki", "loss", "tokens_per_second"])
def test_a_metric_that_runs_log_is_taken(metric: str) -> None:
    objectives.check([Objective(metric=metric)], [config()])


def test_what_a_run_has_not_logged_is_told_with_what_it_has() -> None:
    logged = {"step": 3, "time": 1.0, "loss": 2.0, "eval_loss": None, "eval_loss/a": 1.0}
    logged |= {"wait_seconds/max": 0.1, "wait_most_rank": 1}
    assert objectives.missing(logged, [Objective(metric="loss")]) is None
    assert objectives.missing(logged, [Objective(metric="eval_loss/b")]) == (
        "it has not logged eval_loss/b, by which sweep.objectives compares; what it has logged is "
        "eval_loss, eval_loss/a, loss"
    )
    assert objectives.missing(logged, [Objective(metric="eval_loss")]) is None
    assert "is nothing" in str(objectives.missing({"step": 1}, [Objective(metric="loss")]))
