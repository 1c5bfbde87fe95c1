"""A run as typed data: the dataclasses, YAML in, dotted overrides, checks, YAML out.

    config = load_config("examples/quickstart/config.yaml", ["training.steps=10"])

Every field of a run lives in `schema.py` and nowhere else. `load_config` answers with a `RunConfig` that is known to be
consistent (types, divisibility; `check_layout` adds the number of ranks) or raises `UserError` that names the field.
Files are not looked at here: `data/` checks its own sources before training starts.
"""

from megatron_mm.config.checks import check_layout
from megatron_mm.config.files import config_from_dict, config_to_dict, dump_yaml, load_config
from megatron_mm.config.schema import (
    KINDS,
    CheckpointConfig,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    Kind,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SequenceLayout,
    SourceConfig,
    TrainingConfig,
    VisionConfig,
    source_name,
)

__all__ = [
    "KINDS",
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "Kind",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "SequenceLayout",
    "SourceConfig",
    "TrainingConfig",
    "VisionConfig",
    "check_layout",
    "config_from_dict",
    "config_to_dict",
    "dump_yaml",
    "load_config",
    "source_name",
]
