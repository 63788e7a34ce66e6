"""Stands in for transformers' script of this name, which is no part of its package.

It takes the same arguments, trains the same kind of model with the same Trainer, and says as much.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class Arguments:
    config_name: str
    tokenizer_name: str
    train_file: str
    validation_file: str
    max_seq_length: int
    line_by_line: bool = False


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))  # type: ignore[arg-type]
    if sys.argv[1].endswith(".json"):
        mine, training = parser.parse_json_file(sys.argv[1])
    else:
        mine, training = parser.parse_args_into_dataclasses()
    assert mine.line_by_line
    assert Path(mine.validation_file).stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(mine.tokenizer_name)
    lines = Path(mine.train_file).read_text().splitlines()
    samples = [
        tokenizer(
            line, truncation=True, max_length=mine.max_seq_length, return_special_tokens_mask=True
        )
        for line in lines
    ]
    Trainer(
        model=AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(mine.config_name)),
        args=training,
        train_dataset=samples,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    ).train()


if __name__ == "__main__":
    main()
