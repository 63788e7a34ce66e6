"""RunConfig: every setting of a run with its type, unit, default and rules.

Imports no torch, so the launcher validates in a tenth of a second, and reads no file but a run's
own ``config.yaml``.
"""

from shardwright.train.config.adapter import AdapterConfig, Ia3Adapter, LowRankAdapter, NoAdapter
from shardwright.train.config.batches import BatchSizes, batch_sizes
from shardwright.train.config.cadence import Rhythm, rhythm
from shardwright.train.config.checkpoint import CheckpointConfig
from shardwright.train.config.data import (
    DEFAULT_SEQUENCE_LENGTH,
    DataConfig,
)
from shardwright.train.config.launcher import (
    AccelerateLauncher,
    DeepspeedLauncher,
    LauncherConfig,
    LocalLauncher,
    SlurmLauncher,
    TorchrunLauncher,
)
from shardwright.train.config.messages import known_keys, nearest_key, unknown_key_message
from shardwright.train.config.model import (
    ConfigModel,
    ModelConfig,
    NamedModel,
    PretrainedModel,
    ScratchModel,
    SingleStackModel,
)
from shardwright.train.config.objective import (
    DiffusionObjective,
    MaskedFields,
    MlmObjective,
    ObjectiveConfig,
    SpanCorruptionObjective,
)
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.precision import PrecisionConfig
from shardwright.train.config.rank_layout import RankLayout, rank_layout
from shardwright.train.config.run import RunConfig
from shardwright.train.config.steps import (
    BEGINNING,
    Progress,
    Schedule,
    samples_wanted,
    schedule_of,
    total_steps,
    why_too_short,
)
from shardwright.train.config.strategy import (
    DdpStrategy,
    FsdpStrategy,
    StrategyConfig,
    ZeroStrategy,
)
from shardwright.train.config.tokenizer import (
    ByteBpeTokenizer,
    PretrainedTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
)
from shardwright.train.config.trainer import (
    DEFAULT_MICRO_BATCH_SIZE,
    TrainerConfig,
    accumulation_steps,
    largest_micro_batch,
)
from shardwright.train.config.tree import from_tree, load, to_yaml

__all__ = [
    "BEGINNING",
    "DEFAULT_MICRO_BATCH_SIZE",
    "DEFAULT_SEQUENCE_LENGTH",
    "OPTIMIZERS",
    "AccelerateLauncher",
    "AdapterConfig",
    "BatchSizes",
    "ByteBpeTokenizer",
    "CheckpointConfig",
    "ConfigModel",
    "DataConfig",
    "DdpStrategy",
    "DeepspeedLauncher",
    "DiffusionObjective",
    "FsdpStrategy",
    "Ia3Adapter",
    "LauncherConfig",
    "LocalLauncher",
    "LowRankAdapter",
    "MaskedFields",
    "MlmObjective",
    "ModelConfig",
    "NamedModel",
    "NoAdapter",
    "ObjectiveConfig",
    "PrecisionConfig",
    "PretrainedModel",
    "PretrainedTokenizer",
    "Progress",
    "RankLayout",
    "Rhythm",
    "RunConfig",
    "Schedule",
    "ScratchModel",
    "SingleStackModel",
    "SlurmLauncher",
    "SpanCorruptionObjective",
    "StrategyConfig",
    "TorchrunLauncher",
    "TrainerConfig",
    "UnigramTokenizer",
    "WordPieceTokenizer",
    "ZeroStrategy",
    "accumulation_steps",
    "batch_sizes",
    "from_tree",
    "known_keys",
    "largest_micro_batch",
    "load",
    "nearest_key",
    "rank_layout",
    "rhythm",
    "samples_wanted",
    "schedule_of",
    "to_yaml",
    "total_steps",
    "unknown_key_message",
    "why_too_short",
]
