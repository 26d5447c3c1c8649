"""A whole study on the tiny setting: two sources, two targets, every method, one or two steps each."""

import dataclasses
from pathlib import Path

import tiny

from mpt_jax.config import PipelineConfig, StageConfig

SOURCES, TARGETS = ("tiny_colour", "tiny_mood"), ("tiny_mood", "tiny_animal")
PLAIN, MPT = ((".*", 0.3),), (("shared", 0.3), ("task_.*", 0.4))


def pipeline(folder: Path, run: str = "study", **changes) -> PipelineConfig:
    """2 teachers, the source run, then 2 targets × 2 seeds with k = 2 and 2 targets × 1 seed on all examples, four methods."""
    base = tiny.experiment(folder, run, train={"eval_period": 0, "log_period": 1, "checkpoint_period": 1})
    stages = {
        "mpt": StageConfig(2, 4, MPT),
        "prompt_tuning": StageConfig(2, 4, PLAIN),
        "spot": StageConfig(2, 4, PLAIN),
        "model_tuning": StageConfig(1, 4, ((".*", 0.001),)),
    }
    cfg = PipelineConfig(
        base=base,
        sources=SOURCES,
        targets=TARGETS,
        teacher=StageConfig(2, 4, PLAIN),
        source=StageConfig(2, 8, MPT, "adamw"),
        few_shot=stages,
        full_data=stages,
        k_shots=(2, 0),
        seeds=(0, 1),
        full_seeds=(0,),
        test_split="validation",
        max_test_examples=6,
    )
    return dataclasses.replace(cfg, **changes)
