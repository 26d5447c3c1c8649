"""What a study asks of its tasks, looked at before anything is trained."""

from mpt_jax import setup
from mpt_jax.config import Experiment, PipelineConfig
from mpt_jax.data import registry
from mpt_jax.data.cache import TokenCache, require_splits
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.stages import Stage, mixture_experiment, plan


def check_data(cfg: PipelineConfig, vocabulary: Vocabulary) -> None:
    """That every task has its splits and what its prompts start from, and that zero-shot tasks fit what is scored on them.

    No weight is read for it. A task that is only scored needs the test split alone. With `PipelineConfig.zero_shot`, and where
    prompts start from class labels, token caches are built here.

    Raises:
        UserError: an unknown task, a missing split; a task without labels or words to start from; a zero-shot task without
            metrics, or with a label that the task that is trained on has not, where both are classifications.
    """
    trained = (*cfg.sources, *cfg.targets)
    setup.check_splits(cfg.base, trained, vocabulary, cfg.test_split)
    others = dict.fromkeys(task for tasks in cfg.zero_shot.values() for task in tasks)
    require_splits(cfg.base.data, others, [cfg.test_split], vocabulary)
    for task in from_labels(cfg):
        setup.labels_of(cfg.base, task, vocabulary)

    def known(task: str) -> list[str]:
        """The task's labels ([]: it has none), of its training split if it is trained on: a small test split may lack one."""
        split = cfg.base.data.train_split if task in trained else cfg.test_split
        return sorted(set(_open(cfg, task, split, vocabulary).labels or ()))

    for target, tasks in cfg.zero_shot.items():
        for task in tasks:
            if not _open(cfg, task, cfg.test_split, vocabulary).has_metrics:
                raise UserError(
                    f"PipelineConfig.zero_shot['{target}'] has '{task}', a task without a metric to be scored by; leave it out."
                )
            ours, theirs = known(target), known(task)
            if ours and set(theirs) - set(ours):
                raise UserError(
                    f"PipelineConfig.zero_shot['{target}'] has '{task}', whose labels are {', '.join(theirs)}, but those of "
                    f"'{target}' are {', '.join(ours)}; give a task of the same labels, or register it with these label words "
                    "(docs/tasks.md)."
                )


def check_known_starts(cfg: PipelineConfig) -> None:
    """As much of `check_data` as the registered tasks tell, for a call that reads no data: those known to write free text.

    Raises:
        UserError: an unknown task; one without labels or words that a prompt is to start from.
    """
    for task in from_labels(cfg):
        if not setup.given_labels(cfg.base, task) and registry.writes_free_text(cfg.base.data, task):
            raise setup.no_labels(task, "its answers are free text")


def from_labels(cfg: PipelineConfig) -> list[str]:
    """The tasks with a prompt that starts from their class labels, in any stage."""
    trainings = [experiment for stage in plan(cfg) for experiment in _trainings(stage)]
    starting = [one for one in trainings if one.prompt.method != "none" and one.prompt.init == "labels"]
    return list(dict.fromkeys(stream.task for one in starting for stream in one.data.streams))


def _trainings(stage: Stage) -> list[Experiment]:
    """All that a stage trains; a mixture of SPoT's with all sources, for which of them it will have is not known yet."""
    if stage.transfer is None or "mixture" not in stage.transfer.retrieval.stages:
        return stage.trainings
    return [*stage.trainings, mixture_experiment(stage, [stage.transfer.sources] * len(stage.runs))]


def _open(cfg: PipelineConfig, task: str, split: str, vocabulary: Vocabulary) -> TokenCache:
    return setup.open_caches(cfg.base, [task], split, vocabulary)[0]
