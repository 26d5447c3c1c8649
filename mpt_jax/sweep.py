"""A sweep: a grid of studies, whose points are trained together where they can be, by one job or by several at once.

`run_sweep` plans the jobs (`jobs.py`), and goes through them until every point is done or has failed: what is done is left out,
what another call is at work on is left to it (`board.py`). MODEL_DIR afterwards holds

    results.jsonl               one line per run and cell, with "cell", the axes' values
    report.html, report.md      and figures/*.png
    cells/<n>/config.gin        the study of each cell, for `pipeline` and `show`
    runs/<job>/                 what `train.py` describes, and the job's config.gin
    points/ claims/ failures/   see `board.py`
"""

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpt_jax import pipeline, study_data
from mpt_jax.board import Board, Failure, read_failures, read_results
from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import PipelineConfig, SweepConfig
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.jobs import Job, Point, plan_jobs, spread_of_lengths, steps_of
from mpt_jax.monitor import BadStepError
from mpt_jax.pipeline import Lab, duration, run_stage
from mpt_jax.studies import results
from mpt_jax.studies.grid import grid_findings
from mpt_jax.studies.report import AXES_FILE, write_report
from mpt_jax.studies.results import Record
from mpt_jax.studies.wording import counted

WAIT = 2.0  # seconds between two looks at what other calls have done


class Cell(NamedTuple):
    """One combination of the axes' values."""

    axes: dict[str, Any]
    study: PipelineConfig

    @property
    def name(self) -> str:
        """'PROMPT_LENGTH=20, PromptConfig.init=vocab'."""
        return ", ".join(f"{axis}={value}" for axis, value in self.axes.items())


def run_sweep(cfg: SweepConfig, cells: Sequence[Cell]) -> Path:
    """Does what is left of a sweep, or helps another call with it, and writes the report; returns the path of the HTML page.

    Raises:
        UserError: a mistake in the configuration (told before anything is trained); points that have failed, after all others are
            done; a folder with something else in it.
    """
    folder = check_sweep(cells)
    jobs = plan_jobs([cell.study for cell in cells])
    check_data(cells)
    with Board(folder, cfg.claim_timeout) as board:
        write_text(folder / AXES_FILE, json.dumps({"x": cfg.x, "published": cfg.published}, indent=1) + "\n")
        failed = _Worker(cells, jobs, board, folder).work()
    if not write_results(folder, jobs, cells):
        raise UserError(f"No point of the sweep was done; {_why(failed, jobs, folder)}")
    report = write_report(folder)
    for sentence in grid_findings(results.read(folder / results.RESULTS_FILE), cfg.x):
        print(sentence, file=sys.stderr, flush=True)
    if failed:
        raise UserError(f"{_why(failed, jobs, folder)} The report has the others: {report}.")
    return report


def check_sweep(cells: Sequence[Cell]) -> Path:
    """MODEL_DIR of all cells.

    Raises:
        UserError: cells with several folders; a folder that holds a single run or a study.
    """
    folders = {cell.study.base.train.model_dir for cell in cells}
    if len(folders) > 1:
        raise UserError(f"SweepConfig.axes gives the cells several MODEL_DIRs ({', '.join(sorted(folders))}); give one for all.")
    folder = Path(folders.pop()).expanduser()
    run = RunFolder(str(folder))
    if run.has_progress() or (run.is_study() and not (folder / "points").is_dir()):
        raise UserError(
            f"MODEL_DIR {folder} holds {'a single run' if run.has_progress() else 'a study'}, not a sweep; give another."
        )
    return folder


def check_data(cells: Sequence[Cell]) -> None:
    """`study_data.check_data` of every cell, before anything is trained.

    Raises:
        UserError: what that raises; a vocabulary that is not there.
    """
    for study in {repr(cell.study): cell.study for cell in cells}.values():
        study_data.check_data(study, load_vocabulary(find_vocabulary(study.base.backbone)))


def write_results(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell]) -> int:
    """Writes `results.jsonl` of what is done so far, and returns how many lines it has."""
    collected = collect_results(folder, jobs, cells)
    if collected:
        write_text(folder / results.RESULTS_FILE, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in collected))
    return len(collected)


def collect_results(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell]) -> list[Record]:
    """The results of all points that are done, a line for each run and each cell that has it, in the order of the cells."""
    by_cell: dict[int, list[Record]] = {}
    for point in (point for job in jobs for point in job.points):
        for number in point.cells:
            for record in read_results(folder, point.key) or ():
                cell = cells[number]
                named = {**record, "run_id": f"{cell.name}: {record['run_id']}", "cell": cell.axes}
                by_cell.setdefault(number, []).append(named)
    return [record for number in sorted(by_cell) for record in by_cell[number]]


def _why(failed: Mapping[str, str], jobs: Sequence[Job], folder: Path) -> str:
    points = {point.key: point for job in jobs for point in job.points}
    key, error = next(iter(failed.items()))
    return (
        f"{len(failed)} of {len(points)} points failed; the first, {_name(points[key])}: {error} All are in "
        f"{folder / 'failures'}, and the same command tries them again."
    )


def _name(point: Point) -> str:
    stage = point.stage
    if stage.is_source:
        return f"{stage.title} (seed {stage.runs[0].seed}, {stage.experiment.prompt_length} tokens)"
    length = f", {stage.experiment.prompt_length} tokens" if stage.experiment.prompt_length else ""
    return f"{stage.run_ids[0]}{length}"


class _Worker:
    """One call's way through the jobs."""

    def __init__(self, cells: Sequence[Cell], jobs: Sequence[Job], board: Board, folder: Path):
        self.cells, self.jobs, self.board, self.folder = cells, jobs, board, folder
        self.total = sum(len(job.points) for job in jobs)
        self.failed: dict[str, str] = {}  # in this call
        self.finished: set[str] = set()  # by any call, as far as known
        self.lab: tuple[str, Lab] | None = None  # the latest: of one backbone, kept while its jobs last
        self.began = time.perf_counter()
        self.cost_done = 0.0  # by this call
        self.told_waiting = False
        self.old_failures = self._failures()  # of earlier calls: they are tried again

    def work(self) -> dict[str, str]:
        """Until nothing is left to do; {key: error} of the points that failed, here or in a call that worked beside this one."""
        self._look()
        if self.finished:
            self.say(f"{len(self.finished)} of {self.total} points are done already")
        known = {point.key for job in self.jobs for point in job.points}
        if others := {path.stem for path in (self.folder / "points").glob("*.json")} - known:
            self.say(f"{counted(len(others), 'point')} of other values or settings in {self.folder} will not be in the report")
        while left := self._left():
            if not any(self._try(job) for job in left):
                self._wait()
            self._look()
        return self.failed

    def _left(self) -> list[Job]:
        over = self.finished | set(self.failed)
        return [job for job in self.jobs if any(point.key not in over for point in job.points)]

    def _look(self) -> None:
        """What has been done by anyone."""
        for job in self.jobs:
            self.finished |= {p.key for p in job.points if p.key not in self.finished and self.board.results(p.key) is not None}

    def _try(self, job: Job) -> bool:
        """Do what is left of the job, and free; whether anything was."""
        over = self.finished | set(self.failed)
        missing = [point for point in job.points if point.key not in over]
        if lost := [key for point in missing for key in point.needs if key in self.failed]:
            for point in missing:
                self._fail(point, f"What it starts from has failed: {self.failed[lost[0]]}")
            return True
        if not missing or not job.needs <= self.finished:
            return False
        taken = self.board.take(point.key for point in missing)
        if not taken:
            return False
        self.told_waiting = False
        try:
            self._do(job.only(taken))
        finally:
            self.board.give_back(taken)
        return True

    def _do(self, job: Job) -> None:
        """Train and score points that this call has claimed. One that fails does not stop the rest."""
        stage, first = job.stage(), job.points[0]
        runs = f"{len(job.points)} prompts side by side, " if len(job.points) > 1 else ""
        tokens = spread_of_lengths(job)
        self.say(
            f"{len(self.finished)} of {self.total} points done, {duration(time.perf_counter() - self.began)} gone{self._to_go()}"
            f": {stage.title}; {runs}{f'{tokens}, ' if tokens else ''}{steps_of(job)} steps"
        )
        label = f"[{len(self.finished) + 1}/{self.total}]"
        try:
            lab = self._lab(first)
            records = run_stage(lab, stage, label, self.say)
        except BadStepError as error:
            if len(job.points) == 1:
                self._fail(first, str(error))
                return
            self.say(f"{label} {error.what} Its points are trained one by one.")
            for point in job.points:
                self._do(Job((point,)))
            return
        except (UserError, jax.errors.JaxRuntimeError, ArithmeticError, ValueError, TypeError, LookupError) as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            for point in job.points:
                self._fail(point, " ".join(str(error).split())[:1000] or type(error).__name__)
            return
        pipeline.drop_weights(self.cells[first.cells[0]].study, stage)
        both = list(zip(stage.scored, records, strict=True))
        for n, point in enumerate(job.points):
            self.board.finish(point.key, [record for (run, _), record in both if stage.is_source or run == n])
            self.finished.add(point.key)
        self.cost_done += stage.cost({})
        write_results(self.folder, self.jobs, self.cells)  # `report` shows it

    def _fail(self, point: Point, error: str) -> None:
        self.failed[point.key] = error
        self.board.fail(point.key, _name(point), error)
        self.say(f"failed: {_name(point)}: {error}")

    def _wait(self) -> None:
        """For others, who have claimed what is left or what it starts from."""
        if not self.told_waiting:
            self.say("waiting for other calls of this sweep, which are at work on what is left")
            self.told_waiting = True
        time.sleep(WAIT)
        # What another call has tried and given up meanwhile is not waited for.
        new = {key: failure for key, failure in self._failures().items() if failure != self.old_failures.get(key)}
        self.failed |= {key: failure.error for key, failure in new.items() if key not in self.finished}

    def _failures(self) -> dict[str, Failure]:
        return read_failures(self.folder, [point.key for job in self.jobs for point in job.points])

    def _lab(self, point: Point) -> Lab:
        """The point's backbone, vocabulary and caches; checked against the results that its cell has."""
        cell = self.cells[point.cells[0]]
        study = cell.study
        base, shared = study.base, (study.sources, study.targets, study.zero_shot, study.test_split, study.max_test_examples)
        key = repr((base.backbone, base.data, base.partition, base.decode, base.train.eval_period, *shared))
        if self.lab is None or self.lab[0] != key:
            self.lab = None  # give the memory back first
            recorded = [
                record for job in self.jobs for p in job.points if p.cells[0] == point.cells[0] for record in self._results(p)
            ]
            self.lab = (key, Lab(study, {record["run_id"]: record for record in recorded}))
        return self.lab[1]

    def _results(self, point: Point) -> Sequence[Record]:
        return self.board.results(point.key) or ()

    def _to_go(self) -> str:
        if not self.cost_done:
            return ""
        left = sum(job.only([p.key for p in job.points if p.key not in self.finished]).stage().cost({}) for job in self._left())
        return f", about {duration(left * (time.perf_counter() - self.began) / self.cost_done)} to go"

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
