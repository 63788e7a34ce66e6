"""The settings of transformers' BitsAndBytesConfig, and what to write here instead."""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import rows

BITSANDBYTES = rows(
    fields={
        "quantization_config": "model.quantization, beside an adapter",
        "load_in_8bit": "model.quantization=8bit",
        "load_in_4bit": "model.quantization=4bit",
        "bnb_4bit_compute_dtype": "precision=fp32, bf16 or fp16 (precision.compute_dtype)",
        "llm_int8_skip_modules": "adapter.modules_to_save, of which no copy that is used is packed",
    },
    commands={},
    derived={
        "bnb_4bit_quant_type": "4 bits are NF4",
        "llm_int8_threshold": "it is 6, as transformers has it",
        "llm_int8_has_fp16_weight": "packed weights are not trained",
        "bnb_4bit_quant_storage": "it is uint8, which FSDP divides and gathers as it is",
    },
    left_out={
        "bnb_4bit_use_double_quant": (
            "scales are in fp32, half a bit a weight; quantising them too would save 0.37 bits"
        ),
        "llm_int8_enable_fp32_cpu_offload": "no layer of a model in training is on another device",
    },
)
