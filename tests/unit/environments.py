"""Variables of a shell that may be somebody else's job."""

from __future__ import annotations

OF_A_RANK = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "203.0.113.1",
    "MASTER_PORT": "29500",
    "PET_NNODES": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "PMI_SIZE": "4",
    "PMIX_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_RANK": "1",
    "SHARDWRIGHT_RANKS_OF": "slurm",
}


OF_AN_ENGINE = {
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "FSDP_VERSION": "1",
    "MEGATRON_LM_TP_DEGREE": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}


THE_USERS = {
    "PATH": "/usr/bin",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "OMPI_MCA_btl": "tcp",
    "ACCELERATE_LOG_LEVEL": "debug",
    "TORCHDYNAMO_DISABLE": "1",
    "NCCL_DEBUG": "INFO",
    "RANKS": "mine",
}
