"""The whole configuration of a run, as frozen dataclasses.

gin (`gin_bindings.py`) only fills these; nothing else in the package knows that gin exists. Every field is a number or a
name that a user may want to change; `validate` is called once, before anything is loaded, and names the field that is wrong.
"""

import dataclasses
from typing import Any

from mpt_jax.config.checks import check_local, nearest
from mpt_jax.config.commands import (
    EXPORT_FORMATS,
    BenchConfig,
    DecodeConfig,
    DistributedConfig,
    ExportConfig,
    InferConfig,
    InspectConfig,
    PartitionConfig,
)
from mpt_jax.config.data import NUMBER_METRICS, OFFICIAL, TASK_METRICS, TASK_SPLITS, DataConfig, StreamConfig, TaskConfig
from mpt_jax.config.experiment import Experiment
from mpt_jax.config.model import NUMERICS, BackboneConfig, T5Config
from mpt_jax.config.studies import PipelineConfig, RetrievalConfig, StageConfig, SweepConfig
from mpt_jax.config.training import PROMPT_INITS, LossConfig, OptimizerConfig, PromptConfig, TrainConfig

__all__ = [
    "EXPORT_FORMATS",
    "NUMBER_METRICS",
    "NUMERICS",
    "OFFICIAL",
    "PROMPT_INITS",
    "TASK_METRICS",
    "TASK_SPLITS",
    "BackboneConfig",
    "BenchConfig",
    "DataConfig",
    "DecodeConfig",
    "DistributedConfig",
    "Experiment",
    "ExportConfig",
    "InferConfig",
    "InspectConfig",
    "LossConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "PipelineConfig",
    "PromptConfig",
    "RetrievalConfig",
    "StageConfig",
    "StreamConfig",
    "SweepConfig",
    "T5Config",
    "TaskConfig",
    "TrainConfig",
    "check_local",
    "nearest",
    "to_dict",
]


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)
