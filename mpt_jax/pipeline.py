"""Multitask prompt tuning from end to end, in one call that can be stopped at any time and called again.

`run_pipeline` plans the study (`stages.py`), does the stages whose runs are not yet in `results.jsonl`, and writes the report.
A stage is trained by `run_training`, which resumes or returns at once; then its runs are scored on the test split and their
results are added in one write. MODEL_DIR afterwards holds

    results.jsonl               one line per run
    report.html, report.md      and figures/*.png, written anew by every call
    runs/<stage>/               what `train.py` describes, for each stage, and its config.gin
    claims/                     who is at work on the study: one call at a time (`claims.py`)
"""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import mpt_jax
from mpt_jax import setup
from mpt_jax.checkpoint.backbone import Backbone, find_vocabulary
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.checkpoint.identity import fingerprint_of, remember
from mpt_jax.claims import Claims
from mpt_jax.config import Experiment, PipelineConfig
from mpt_jax.data.cache import TokenCache
from mpt_jax.data.sampling import scarce_classes
from mpt_jax.data.vocabulary import Vocabulary, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.evaluate import evaluate, examined, main_score
from mpt_jax.files import write_text
from mpt_jax.gin_text import config_text
from mpt_jax.models.t5 import count_parameters
from mpt_jax.monitor import BadStepError
from mpt_jax.prompts import build_prompt
from mpt_jax.stages import Stage, alone, check_same, check_scored, plan, remaining, run_config
from mpt_jax.studies import results
from mpt_jax.studies.findings import findings
from mpt_jax.studies.report import write_report
from mpt_jax.studies.results import SEVERAL, Record, zero_shot_id
from mpt_jax.study_data import StudyData, check_backbone
from mpt_jax.train import TrainResult, run_training
from mpt_jax.transfer import Start, find_starts

STUDY = "study"  # the claim of a whole study
REFERENCE_FILE = "reference_scores.json"  # beside the tasks: {task: {"chance": …, "ceiling": …}}, percentages


def run_pipeline(cfg: PipelineConfig, begin: Callable[[], None] = lambda: None) -> Path:
    """Does what is left of a study and writes its report; returns the path of the HTML page.

    Args:
      begin: is called when the study is this call's and nothing of it was refused, before anything is trained.
    Raises:
      UserError: a mistake in the configuration (told before anything is trained), a folder with results of another study, or one
        that another call is at work in.
    """
    folder = Path(cfg.base.train.model_dir).expanduser()
    check_study(cfg)  # before the claim, which writes into the folder
    with Claims(folder / "claims", cfg.claim_timeout) as claims:
        if not claims.take_or_wait(STUDY, lambda text: print(text, file=sys.stderr, flush=True)):
            owner = {"pid": "?", "host": "?"} | claims.owner(STUDY)
            raise UserError(
                f"Process {owner['pid']} on {owner['host']} is at work on the study in MODEL_DIR {folder}, which one call does "
                "at a time; wait until it has ended and give the same command again, or give another MODEL_DIR."
            )
        _do_what_is_left(cfg, folder, claims, begin)
        report = write_report(folder)
    for sentence in findings(results.read(folder / results.RESULTS_FILE)):
        print(sentence, file=sys.stderr, flush=True)
    return report


def _do_what_is_left(cfg: PipelineConfig, folder: Path, claims: Claims, begin: Callable[[], None]) -> None:
    """Of a study that is claimed."""
    stages, recorded = check_study(cfg)
    path = folder / results.RESULTS_FILE
    left = remaining(cfg, stages, set(recorded))
    clock = Clock(stages, left)
    if left:
        lab = Lab(cfg, left[0].trainings[-1], recorded.values(), claims.check)
        begin()
        clock.test_sizes = lab.data.test_sizes()
        for stage in left:
            clock.begin(stage)
            try:
                records = run_stage(lab, stage, clock.label, clock.say)
            except BadStepError as error:
                raise _diverged(lab, stage, error) from None
            claims.check(STUDY)
            results.append(path, records)
            drop_weights(cfg, stage)
            clock.end(stage, records)
    else:
        check_kept(cfg, recorded.values())
        begin()
        clock.say(f"all {len(results.runs_of(recorded.values()))} runs are in {path}; nothing is left to train")


def check_study(cfg: PipelineConfig) -> tuple[list[Stage], dict[str, Record]]:
    """A study's stages, and the results that its folder has already.

    Raises:
      UserError: the study cannot be planned, its folder holds a single run, or a planned run's result is there, but of another
        configuration.
    """
    folder = Path(cfg.base.train.model_dir).expanduser()
    if RunFolder(str(folder)).has_progress():
        raise UserError(f"MODEL_DIR {folder} holds a single run, not a study; give another MODEL_DIR.")
    if (folder / "points").is_dir():
        raise UserError(f"MODEL_DIR {folder} holds a sweep, not a study; continue it with `sweep`, or give another MODEL_DIR.")
    stages, recorded = plan(cfg), read_recorded(folder)
    for stage in stages:
        for n, name in enumerate(stage.run_ids):
            if name in recorded and "config" in recorded[name]:
                check_same(recorded[name]["config"], run_config(stage, n, str(folder)), str(folder), name)
            if name in recorded:
                check_scored(stage, n, recorded, str(folder))
    return stages, recorded


def read_recorded(folder: Path) -> dict[str, Record]:
    """The results in a study's folder by run_id; {} where there are none yet."""
    path = folder / results.RESULTS_FILE
    return {record["run_id"]: record for record in results.read(path)} if path.exists() else {}


class Lab:
    """What all stages share: the backbone, the vocabulary and every cache, opened (and built) before anything is trained.

    Args:
        first: the first training; the backbone is laid out as it needs it.
        recorded: results that those of this study will be beside.
        check: stops the work by what it raises (`run_training`).
    Raises:
        UserError: a result of another backbone, of other data or scored in another way.
    """

    def __init__(self, cfg: PipelineConfig, first: Experiment, recorded: Iterable[Record], check: Callable[[], None]):
        self.cfg, self.check = cfg, check
        self.mesh = setup.mesh_of(first)
        self.backbone: Backbone = setup.open_backbone(cfg.base, self.mesh)
        remember(cfg.base.backbone, cfg.base.data, self.backbone.fingerprint)
        recorded = list(recorded)
        check_backbone(cfg, recorded, self.backbone.fingerprint)
        self.vocabulary: Vocabulary = setup.open_vocabulary(cfg.base, self.backbone)
        self.data = StudyData(cfg, self.vocabulary)
        self.data.check(recorded)
        documented = reference_scores(cfg.base.data.task_modules)
        most = cfg.max_test_examples
        self.references = {task: reference_of(documented.get(task, {}), test, most) for task, test in self.data.tests.items()}

    def lay_out(self, experiment: Experiment) -> None:
        """The backbone as this training needs it: with `num_partitions=0` each has its own mesh, and two copies may not fit."""
        if (mesh := setup.mesh_of(experiment)) != self.mesh:
            self.backbone, self.mesh = setup.place_backbone(self.backbone, mesh), mesh


def check_kept(cfg: PipelineConfig, recorded: Iterable[Record]) -> None:
    """What `Lab` checks of results, where it is not needed for anything else; no weight is loaded for it.

    Raises:
        UserError: as there.
    """
    recorded = list(recorded)
    StudyData(cfg, load_vocabulary(find_vocabulary(cfg.base.backbone))).check(recorded)
    key = jax.random.key(cfg.base.train.seed)
    check_backbone(cfg, recorded, fingerprint_of(cfg.base.backbone, cfg.base.data, key))


def run_stage(lab: Lab, stage: Stage, label: str, say: Callable[[str], None]) -> list[Record]:
    """Trains a stage and scores each of its runs; returns their results, as `Stage.scored` has them.

    Args:
        label: put before every line of progress.
        say: is told what is done besides training.
    Raises:
        BadStepError: a run has diverged.
    """
    began = time.perf_counter()
    experiment = stage.trainings[-1]
    lab.lay_out(experiment)
    starts = find_starts(stage, lab.backbone, lab.vocabulary, label, lab.check) if stage.transfer else []
    trained = run_training(experiment, lab.backbone, label=label, check=lab.check)
    text = f"# A run of a study: evaluate, infer and export take this file.\n\n{config_text(experiment)}"
    write_text(stage.folder / "config.gin", text)
    say(f"scoring {len(stage.runs)} run{'s' if len(stage.runs) > 1 else ''} on {lab.cfg.test_split} examples")
    groups = chosen_groups(stage, trained)
    scores = score(lab, stage, trained, groups)
    seconds = (trained.earlier_seconds + time.perf_counter() - began) / len(stage.runs)
    more: list[dict[str, Any]] = [{"group": group} for group in groups]
    for n, start in enumerate(starts):
        more[n] |= _of_start(stage, start, trained, n)
    both = zip(stage.scored, scores, strict=True)
    return [make_record(lab, stage, n, task, metrics, seconds, more[n]) for (n, task), metrics in both]


def chosen_groups(stage: Stage, trained: TrainResult) -> list[int]:
    """The group of each run's result in its bank: where several prompts were trained for a run, the best by validation score."""
    if stage.tries == 1:
        return [stream.group for stream in stage.experiment.data.streams]
    scores = trained.scores.reshape(-1, stage.tries)
    return [n * stage.tries + int(best) for n, best in enumerate(np.argmax(scores, axis=1))]


def _of_start(stage: Stage, start: Start, trained: TrainResult, n: int) -> dict[str, Any]:
    """What the result of SPoT's run n tells of its start."""
    assert stage.transfer is not None
    values = "source_losses" if stage.transfer.retrieval.by == "loss" else "source_similarities"
    about: dict[str, Any] = {"started_from": SEVERAL.join(start.sources), values: start.ranked_by}
    if stage.tries > 1:
        scores = trained.scores[n * stage.tries : (n + 1) * stage.tries]
        about["started_from"] = start.sources[int(np.argmax(scores))]
        about["tried"] = dict(zip(start.sources, scores.tolist(), strict=True))
    return about


def _diverged(lab: Lab, stage: Stage, error: BadStepError) -> UserError:
    """A stage that is trained anew must not differ from its like whose results are kept."""
    folder = Path(lab.cfg.base.train.model_dir).expanduser()
    alike = [name for name, r in read_recorded(folder).items() if (r["stage"], r["method"]) == (stage.kind, stage.method)]
    then = f"give another MODEL_DIR, for {folder} has {alike[0]} at the old rate" if alike else f"delete {stage.folder}"
    return UserError(f"{error.what} Lower the learning rate in {error.settings or stage.settings}.rules and {then}.")


def score(lab: Lab, stage: Stage, trained: TrainResult, groups: Sequence[int]) -> list[dict[str, float]]:
    """The metrics of each run on the test splits of its tasks, in the order of `Stage.scored`.

    Labels to rank are those of the task that was trained on; a task that is only scored may have no training split.

    Args:
        groups: in the bank, of the prompt that is each run's result.
    """
    experiment, trainable = stage.experiment, trained.params
    streams = setup.Streams(experiment.data.streams, rates=())
    if "backbone" in trainable:  # laid out on the mesh as the frozen one is
        tuned = lab.backbone._replace(params=trainable["backbone"])
        trainable = {"backbone": setup.open_backbone(experiment, lab.mesh, tuned).params}
    elif stage.tries > 1:
        trainable = {"prompt": trainable["prompt"][np.asarray(groups)]}
    return evaluate(
        lab.backbone,
        build_prompt(
            experiment.prompt, streams.groups, lab.backbone.model.config.d_model, streams.lengths(experiment.prompt.length)
        ),
        jax.tree.map(jnp.asarray, trainable),
        [lab.data.tests[task] for _, task in stage.scored],
        vocabulary=lab.vocabulary,
        lengths=experiment.data.lengths,
        decode=experiment.decode,
        max_examples=lab.cfg.max_test_examples,
        mesh=lab.mesh,
        prompt_ids=[n for n, _ in stage.scored],
        labels=setup.open_labels(experiment, [stage.runs[n].task for n, _ in stage.scored], lab.vocabulary),
    )


def make_record(
    lab: Lab, stage: Stage, n: int, task: str, metrics: Mapping[str, float], seconds: float, more: Mapping[str, Any]
) -> Record:
    """The line of `results.jsonl` for run n of a stage, scored on `task`; `more` is added to it.

    On another task than its own it has "trained_on", a stage and id that say so, and no time, which is in the run's own line.
    """
    run, experiment = stage.runs[n], stage.experiment
    if task != run.task:
        own = {"run_id": zero_shot_id(stage.run_ids[n], task), "stage": results.ZERO_SHOT, "seconds": None}
        more = {**more, **own, "trained_on": run.task}
    trained, shared = numbers_trained(alone(stage, n))
    selected = bool(experiment.train.eval_period)
    return {
        "run_id": stage.run_ids[n],
        "stage": stage.kind,
        "method": stage.method,
        "task": task,
        "k": stage.k,
        "seed": run.seed,
        "split": lab.cfg.test_split,
        "selection_split": experiment.data.eval_split if selected else None,
        "score": main_score(dict(metrics)),
        "metrics": dict(metrics),
        "num_examples": lab.data.test_sizes()[task],
        **lab.references[task],
        "scarce": scarce_classes(lab.data.train[run.task], stage.k),
        "params_trained": trained,
        "params_shared": shared,
        "steps": experiment.train.steps,
        "batch": stage.batch_per_run,
        "seconds": round(seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "folder": stage.folder.relative_to(Path(lab.cfg.base.train.model_dir).expanduser()).as_posix(),
        "backbone": lab.backbone.fingerprint,
        "data": lab.data.digest(run.task, task),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__, "flax": flax.__version__},
        "config": run_config(stage, n, str(Path(lab.cfg.base.train.model_dir).expanduser())),
        **more,
    }


def numbers_trained(experiment: Experiment) -> tuple[int, int]:
    """(numbers that a run trains for its task, those of them in a prompt that several tasks can share).

    Plain: P·D. MPT: P·D + R (P + D), of which P·D are the shared prompt P*. Model tuning: the whole model.
    """
    prompt, width = experiment.prompt, experiment.backbone.architecture.d_model
    if prompt.method == "none":
        return count_parameters(experiment.backbone.architecture), 0
    own = prompt.rank * (prompt.length + width) if prompt.method == "mpt" else 0
    plain = prompt.length * width
    return plain + own, plain if own else 0


def reference_of(documented: Mapping[str, float], test: TokenCache, max_examples: int) -> dict[str, float | None]:
    """The task's chance and ceiling as documented. Where chance is not, the score of the best single label stands for it.

    That is the most that a constant answer reaches by the task's own metrics, on the examples that are scored: with accuracy
    the share of the largest class. Tasks without labels have none.
    """
    chance = documented.get("chance")
    if chance is None and test.labels is not None and test.has_metrics:
        rows = examined(len(test), max_examples)
        chance = max(main_score(test.score([label] * len(rows), rows)) for label in test.label_set.texts)
    return {"chance": chance, "ceiling": documented.get("ceiling")}


def reference_scores(task_modules: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the packages that register tasks document in their `reference_scores.json`; they are not imported for it."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(module.partition(".")[0] for module in task_modules):
        spec = importlib.util.find_spec(name)
        path = Path(spec.origin).parent / REFERENCE_FILE if spec and spec.origin else None
        if path is not None and path.is_file():
            try:
                found |= json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not JSON ({error}); mend or remove it.") from None
    return found


class Clock:
    """Tells which stage is running, how long the study has taken, and how long it will still take."""

    def __init__(self, stages: Sequence[Stage], left: Sequence[Stage]):
        self.titles = list(dict.fromkeys(stage.title for stage in stages))
        self.sources = {stage.runs[0].seed for stage in stages if stage.is_source}
        self.left = list(left)
        self.began = self.stage_began = time.perf_counter()
        self.spent = self.measured = 0.0  # seconds and cost of the stages that are done
        self.test_sizes: dict[str, int] = {}
        self.label = ""

    def begin(self, stage: Stage) -> None:
        number = self.titles.index(stage.title) + 1
        self.label = f"[{number}/{len(self.titles)}]"
        single = f" ({stage.runs[0].task}, seed {stage.runs[0].seed})" if stage.method == "model_tuning" else ""
        if stage.is_source and len(self.sources) > 1:
            single = f" (seed {stage.runs[0].seed})"
        size = f"{len(stage.runs)} runs, " if len(stage.runs) > 1 else ""
        left = self.estimate()
        to_go = f"about {duration(left)} to go" if left else "time to go not known yet"
        self.say(
            f"stage {number} of {len(self.titles)}: {stage.title}{single}; {size}{stage.experiment.train.steps} steps; "
            f"{duration(time.perf_counter() - self.began)} gone, {to_go}"
        )
        self.stage_began = time.perf_counter()

    def end(self, stage: Stage, records: Sequence[Record]) -> None:
        self.spent += time.perf_counter() - self.stage_began
        self.measured += stage.cost(self.test_sizes)
        self.left.remove(stage)
        runs = results.runs_of(records)
        tasks = results.values_of(runs, "task")
        means = {task: results.spread(run["score"] for run in results.select(runs, task=task)) for task in tasks}
        scores = ", ".join(f"{task} {mean}" for task, mean in means.items())
        self.say(f"{self.label} done in {duration(time.perf_counter() - self.stage_began)}: {scores}")

    def estimate(self) -> float:
        """Seconds that the remaining stages will take at the rate so far; 0 while that is not known."""
        return self.spent / self.measured * sum(stage.cost(self.test_sizes) for stage in self.left) if self.measured else 0.0

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """'12 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def drop_weights(cfg: PipelineConfig, stage: Stage) -> None:
    """A tuned model is as large as the backbone; once it is scored only its metrics are kept, unless `keep_models`."""
    if stage.method == "model_tuning" and not cfg.keep_models:
        for name in ("model", "checkpoints"):
            shutil.rmtree(stage.folder / name, ignore_errors=True)
