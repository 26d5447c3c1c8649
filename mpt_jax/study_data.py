"""What a study asks of its tasks, looked at before anything is trained; and whether results that it has are of the same."""

from collections.abc import Iterable

from mpt_jax import setup
from mpt_jax.config import Experiment, PipelineConfig
from mpt_jax.data import fingerprint, registry
from mpt_jax.data.cache import TokenCache, require_splits
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.stages import Stage, mixture_experiment, plan, tasks_of
from mpt_jax.studies.results import Record


class StudyData:
    """Every cache of a study, opened (and built).

    Attributes:
        train: of each task that is trained on.
        tests: of each task that is scored.

    Raises:
        UserError: as `check_data`.
    """

    def __init__(self, cfg: PipelineConfig, vocabulary: Vocabulary):
        self.cfg = cfg
        check_data(cfg, vocabulary)
        trained, tasks = (*cfg.sources, *cfg.targets), tasks_of(cfg)
        train = setup.open_caches(cfg.base, trained, cfg.base.data.train_split, vocabulary)
        self.train = dict(zip(trained, train, strict=True))
        if cfg.base.train.eval_period:
            setup.open_caches(cfg.base, trained, cfg.base.data.eval_split, vocabulary)
        self.tests = dict(zip(tasks, setup.open_caches(cfg.base, tasks, cfg.test_split, vocabulary), strict=True))
        setup.open_labels(cfg.base, trained, vocabulary)
        self._digests = [setup.data_digests(list(caches.values())) for caches in (self.train, self.tests)]

    def digest(self, trained_on: str, task: str) -> str | None:
        """Of what is trained on and of what is scored; None where one of them is not in this study."""
        train, tests = self._digests
        return fingerprint.digest(train[trained_on], tests[task]) if trained_on in train and task in tests else None

    def test_sizes(self) -> dict[str, int]:
        """How many examples of each task are scored."""
        most = self.cfg.max_test_examples
        return {task: min(len(cache), most) if most else len(cache) for task, cache in self.tests.items()}

    def check(self, recorded: Iterable[Record]) -> None:
        """UserError where a result was scored on another split, on other examples or on another number of them than now."""
        sizes = self.test_sizes()
        for record in (record for record in recorded if record["task"] in self.tests):
            task, where = record["task"], f"{self.cfg.base.train.model_dir} holds the result of {record['run_id']}"
            now = self.digest(record.get("trained_on", task), task)
            split, number = record.get("split", self.cfg.test_split), record.get("num_examples", sizes[task])
            if split != self.cfg.test_split:
                raise UserError(
                    f"{where} on the split '{split}', but PipelineConfig.test_split is '{self.cfg.test_split}' now; give the old "
                    "value to continue, or another MODEL_DIR."
                )
            if now is not None and record.get("data", now) != now:
                raise UserError(
                    f"{where} on other training or test examples of the task '{task}' than there are now; restore them to "
                    "continue, or give another MODEL_DIR."
                )
            if number != sizes[task]:
                raise UserError(
                    f"{where} on {number} test examples, but now, with PipelineConfig.max_test_examples="
                    f"{self.cfg.max_test_examples}, it would be on {sizes[task]}; give the old value to continue, or another "
                    "MODEL_DIR."
                )


def check_backbone(cfg: PipelineConfig, recorded: Iterable[Record], fingerprint: str) -> None:
    """UserError where a result is of other weights than those with the fingerprint."""
    for record in recorded:
        if record.get("backbone", fingerprint) != fingerprint:
            raise UserError(
                f"{cfg.base.train.model_dir} holds the result of {record['run_id']} on the backbone {record['backbone']}, but "
                f"{cfg.base.backbone.checkpoint} is {fingerprint}; give the old INITIAL_CHECKPOINT_PATH to continue, or another "
                "MODEL_DIR."
            )


def check_data(cfg: PipelineConfig, vocabulary: Vocabulary) -> None:
    """That every task has its splits and what its prompts start from, and that zero-shot tasks fit what is scored on them.

    No weight is read for it. A task that is only scored needs the test split alone. With `PipelineConfig.zero_shot`, and where
    prompts start from class labels, token caches are built here.

    Raises:
        UserError: an unknown task, a missing split; a task without metrics, or without labels or words to start from; a zero-shot
            task with a label that the task that is trained on has not, where both are classifications.
    """
    trained = (*cfg.sources, *cfg.targets)
    setup.check_splits(cfg.base, trained, vocabulary, cfg.test_split)
    others = dict.fromkeys(task for tasks in cfg.zero_shot.values() for task in tasks)
    require_splits(cfg.base.data, others, [cfg.test_split], vocabulary)
    for task in (*trained, *others):
        if not registry.has_metrics(cfg.base.data, task):
            raise UserError(f"A study scores '{task}', a task without metrics; leave it out of PipelineConfig, or give it some.")
    for task in from_labels(cfg):
        setup.labels_of(cfg.base, task, vocabulary)

    def known(task: str) -> list[str]:
        """The task's labels ([]: it has none), of its training split if it is trained on: a small test split may lack one."""
        split = cfg.base.data.train_split if task in trained else cfg.test_split
        return sorted(set(_open(cfg, task, split, vocabulary).labels or ()))

    for target, tasks in cfg.zero_shot.items():
        for task in tasks:
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
