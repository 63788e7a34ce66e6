"""What transformers' Trainer is constructed with, and what to write here in place of each."""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import rows

TRAINER_PARAMETERS = rows(
    fields={
        "model": "model=..., with classes of your own by model.import",
        "train_dataset": "data=text, hub or tokens, or a function of your own by data=python",
        "eval_dataset": "data.eval_fraction, data.eval_paths or, of data=hub, data.eval_split",
        "processing_class": "tokenizer=...",
        "compute_loss_func": "objective.loss",
        "callbacks": "trainer.callbacks",
        "optimizers": "trainer.custom_class; the schedule is trainer.lr_scheduler",
        "optimizer_cls_and_kwargs": "trainer.custom_class and trainer.custom_options",
    },
    commands={},
    derived={
        "args": "the config has a field for each of them, as above",
        "data_collator": "the objective makes batches and labels",
    },
    left_out={
        "model_init": "the trials of a sweep are runs of their own: `shardwright sweep`",
        "compute_metrics": "no predictions are kept; a callback sees what is logged",
        "preprocess_logits_for_metrics": "no predictions are kept",
    },
)
