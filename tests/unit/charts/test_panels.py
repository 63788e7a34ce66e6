from __future__ import annotations

from shardwright.train.charts.panels import curve_name, panels

LOGGED = (
    *("loss", "eval_loss", "eval_loss/wiki", "eval_loss/code", "eval_bits_per_byte"),
    *("learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes"),
    *("auxiliary_loss", "eval_perplexity"),
)


def test_the_curves_of_one_run_that_are_read_together_share_a_chart() -> None:
    found = panels(LOGGED, one_run=True)
    assert [(panel.title, panel.metrics) for panel in found] == [
        ("Loss", ("loss", "eval_loss")),
        ("Held-out loss of each set", ("eval_loss/code", "eval_loss/wiki")),
        ("Held-out bits per byte", ("eval_bits_per_byte",)),
        ("Learning rate", ("learning_rate",)),
        ("Gradient norm", ("grad_norm",)),
        ("Speed", ("tokens_per_second",)),
        ("MFU", ("mfu",)),
        ("Peak memory", ("peak_memory_bytes",)),
        ("Auxiliary loss", ("auxiliary_loss",)),
        ("Held-out perplexity", ("eval_perplexity",)),
    ]
    assert [curve_name(name) for name in LOGGED[:4]] == ["training", "held out", "wiki", "code"]


def test_of_several_runs_each_metric_has_a_chart() -> None:
    found = panels(LOGGED, one_run=False)
    assert sorted(metric for panel in found for metric in panel.metrics) == sorted(LOGGED)
    assert all(len(panel.metrics) == 1 for panel in found)
    assert [panel.title for panel in found][:4] == [
        *("Training loss", "Held-out loss", "Held-out loss: code", "Held-out loss: wiki"),
    ]
    assert len({panel.name for panel in found}) == len(found)


def test_what_ranks_send_is_drawn_beside_their_speed() -> None:
    found = panels(("sent_bytes_per_second", "peak_memory_bytes", "mfu"), one_run=True)
    assert [panel.name for panel in found] == ["mfu", "sent_bytes_per_second", "peak_memory_bytes"]
    assert (found[1].unit, found[1].factor) == ("GB per second", 1e-9)


def test_there_is_a_chart_for_what_is_logged_alone() -> None:
    assert panels([], one_run=True) == []
    assert [panel.title for panel in panels(["loss"], one_run=True)] == ["Training loss"]


def test_statistics_of_modules_share_a_chart_and_those_of_several_runs_are_of_the_model() -> None:
    modules = [f"update_norm/transformer.h.{n}.mlp" for n in range(12)]
    logged = ["loss", "update_norm", "weight_norm", *modules]
    found = panels(logged, one_run=True)
    assert [(panel.title, len(panel.metrics)) for panel in found] == [
        ("Training loss", 1),
        ("Norm of the weights", 1),
        ("Norm of the updates", 1),
        ("Norm of the updates, of each module", 12),
    ]
    found = panels(logged, one_run=False)
    assert [panel.metrics for panel in found] == [("loss",), ("weight_norm",), ("update_norm",)]
