"""The arguments of transformers' run_clm.py and run_mlm.py, and what to write here instead."""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import rows

EXAMPLE_SCRIPTS = rows(
    fields={
        "model_name_or_path": "model=pretrained model.name=..., a run directory too",
        "model_type": "model=NAME, such as model=gpt2_small",
        "config_overrides": "model.overrides, under model=from_config",
        "config_name": "model=from_config model.name=..., which needs no weights",
        "tokenizer_name": "tokenizer=pretrained tokenizer.name=...",
        "cache_dir": "HF_HOME for what is downloaded, data.cache_dir for what is tokenised",
        "model_revision": "model.revision and tokenizer.revision",
        "trust_remote_code": "model.trust_remote_code and tokenizer.trust_remote_code",
        "dtype": "precision=fp32, bf16 or fp16",
        "torch_dtype": "precision=fp32, bf16 or fp16",
        "dataset_name": "data=hub data.name=..., and data.eval_split=validation where it has one",
        "dataset_config_name": "data=hub data.config=...",
        "train_file": "data=text data.paths=[...]",
        "validation_file": (
            "data.eval_paths={NAME: PATH}; or data.eval_fraction of the corpus itself"
        ),
        "validation_split_percentage": "data.eval_fraction, a share such as 0.05",
        "max_train_samples": "data.max_documents",
        "max_eval_samples": "trainer.eval_max_samples",
        "streaming": "data=hub data.streaming=true",
        "block_size": "data.sequence_length",
        "max_seq_length": "data.sequence_length",
        "mlm_probability": "objective.masking_rate",
        "line_by_line": "data.line_by_line",
        "pad_to_max_length": "data.unpad=false; lines are laid end to end otherwise",
    },
    commands={},
    derived={
        "use_fast_tokenizer": "tokenizers are fast ones",
        "preprocessing_num_workers": "as many processes prepare data as cores and memory allow",
        "keep_linebreaks": "they are kept, but under data.line_by_line",
        "overwrite_cache": "tokens are found again by the files, settings and versions behind them",
    },
    left_out={
        "token": "the hub's own login is used: `hf auth login`, or HF_TOKEN",
        "use_auth_token": "the hub's own login is used: `hf auth login`, or HF_TOKEN",
        "low_cpu_mem_usage": "weights are built sharded already",
    },
)
