"""Keys of DeepSpeed's JSON that it documents and that neither a field nor `strategy.extra` takes.

The others are in `shardwright.train.config.rules.deepspeed_keys`.
"""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import rows

_DATA = "data are prepared, ordered and scheduled by the section data"
_INFERENCE = "it is for inference"

DEEPSPEED_JSON = rows(
    fields={
        "zero_optimization": "strategy=zero0, zero1, zero2 or zero3",
        "zero_optimization.cpu_offload": "strategy.offload_optimizer=cpu",
        "zero_optimization.cpu_offload_param": "strategy.offload_parameters=cpu",
        "zero_optimization.cpu_offload_use_pin_memory": "strategy.pin_memory",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
            "strategy.gather_16bit_weights_on_save"
        ),
        "comet": "tracking=none, tensorboard, wandb, mlflow or trackio",
        "mlflow": "tracking=mlflow",
        "compile": "trainer.compile",
        "nebula": "checkpoint.async=true",
        "datastates": "checkpoint.async=true",
    },
    commands={
        "autotuning": "`shardwright plan hardware=...`, which compares the strategies",
    },
    derived={
        "fp32_allreduce": "precision.reduce_dtype is fp32 by default",
        "seq_parallel_communication_data_type": "samples are not divided among ranks",
        "optimizer.legacy_fusion": "the optimizer is the same under every strategy",
    },
    left_out={
        "data_efficiency": _DATA,
        "curriculum_learning": f"{_DATA}; data.stages changes what is trained on as a run goes",
        "progressive_layer_drop": "it is for models of DeepSpeed's own",
        "sparse_attention": "attention is transformers' own, or that of the run's documents",
        "sparse_gradients": "gradients of embeddings are dense",
        "compression_training": "weights are trained, not compressed",
        "weight_quantization": "weights are trained, not compressed",
        "quantize_training": "weights are trained, not compressed",
        "hybrid_engine": "it is for reinforcement learning",
        "elasticity": ("launcher.min_nodes lets nodes go and come, and the batch stays what it is"),
        "pipeline": "ranks divide data and states, not layers",
        "tensor_parallel": "ranks divide data and states, not layers or samples",
        "sequence_parallel_size": "ranks divide data and states, not layers or samples",
        "expert_parallel": "ranks divide data and states, not experts",
        "eigenvalue": "it is for compression",
        "aio.use_gds": "GPUDirect Storage is not tried",
        "zenflow": "it takes its own optimizer's settings",
    },
)
