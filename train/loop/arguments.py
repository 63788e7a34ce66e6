"""From config to the arguments under which transformers trains."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
import transformers

from shardwright.train.config import Rhythm, Schedule, accumulation_steps
from shardwright.train.optimizer.schedule import as_transformers
from shardwright.train.strategy.engine import Engine


def training_arguments(
    engine: Engine, run_dir: Path, *, total_steps: int, schedule: Schedule, rhythm: Rhythm
) -> transformers.TrainingArguments:
    """Derive `TrainingArguments`, under which transformers knows the engine that is to come.

    Those of the schedule are for what trackers show: the Trainer makes it itself.
    """
    config = engine.config
    trainer, precision = config.trainer, config.precision
    name, arguments = as_transformers(schedule, trainer.learning_rate)
    args = transformers.TrainingArguments(
        output_dir=str(run_dir),
        run_name=config.name,
        seed=config.seed,
        use_cpu=config.launcher.device == "cpu",  # else transformers takes CUDA, or MPS
        ddp_backend=dist.get_backend() if dist.is_initialized() else None,
        max_steps=total_steps,
        per_device_train_batch_size=trainer.samples_per_pass,
        per_device_eval_batch_size=trainer.eval_samples_per_pass,
        gradient_accumulation_steps=accumulation_steps(trainer, engine.layout),
        average_tokens_across_devices=True,
        learning_rate=trainer.learning_rate,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=arguments,
        warmup_steps=schedule.warmup_steps,
        max_grad_norm=trainer.max_grad_norm,
        fp16=precision.compute_dtype == "fp16",
        tf32=None,  # `process.numerics` has set it
        # By tokens and epochs `callbacks.recurring` does it.
        logging_strategy="steps" if rhythm.log.steps else "no",
        logging_steps=rhythm.log.steps or 500,
        logging_first_step=True,
        # The Trainer would otherwise write the mean of earlier losses where one is NaN.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if rhythm.evaluate.steps else "no",
        eval_steps=rhythm.evaluate.steps,
        save_strategy="steps" if rhythm.save.steps else "no",
        save_steps=rhythm.save.steps or 500,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        **engine.training_arguments(),
    )
    # One process is one GPU: with several in sight the Trainer would take DataParallel unasked.
    args._n_gpu = min(args.n_gpu, 1)
    return args
