"""A sweep: a grid of studies, whose points are trained together where they can be, by one job or by several at once.

`run_sweep` plans the jobs (`jobs.py`), and goes through them until every point is done or has failed: what is done is left out,
what another call is at work on is left to it (`board.py`). MODEL_DIR afterwards holds

    results.jsonl               one line per run and cell, with "cell", the axes' values; the first also with "sweep"
    report.html, report.md      and figures/*.png
    cells/<n>/config.gin        the study of each cell, for `pipeline` and `show`
    runs/<job>/                 what `train.py` describes, and the job's config.gin
    points/ claims/ failures/   see `board.py`
"""

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpt_jax import pipeline, study_data
from mpt_jax.board import Board, Failure, read_failures, read_results
from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.claims import ClaimLost
from mpt_jax.config import PipelineConfig, SweepConfig
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.errors import UserError, sentence
from mpt_jax.files import write_text
from mpt_jax.gin_text import gin_literal
from mpt_jax.jobs import Job, Point, collect, plan_jobs, spread_of_lengths, steps_of
from mpt_jax.monitor import BadStepError
from mpt_jax.pipeline import Lab, duration, run_stage
from mpt_jax.studies import results
from mpt_jax.studies.grid import grid_findings
from mpt_jax.studies.published import Drawing, read_published
from mpt_jax.studies.report import write_report
from mpt_jax.studies.results import Record
from mpt_jax.studies.wording import counted

WAIT = 2.0  # seconds between two looks at what other calls have done


class Cell(NamedTuple):
    """One combination of the axes' values."""

    axes: dict[str, Any]
    study: PipelineConfig

    @property
    def shown(self) -> dict[str, Any]:
        """The values as results have them."""
        return {axis: shown(value) for axis, value in self.axes.items()}

    @property
    def name(self) -> str:
        """'PROMPT_LENGTH=20, PromptConfig.init=vocab'."""
        return ", ".join(f"{axis}={value}" for axis, value in self.shown.items())


def run_sweep(cfg: SweepConfig, cells: Sequence[Cell], begin: Callable[[Path], None] = lambda folder: None) -> Path:
    """Does what is left of a sweep, or helps another call with it, and writes the report; returns the path of the HTML page.

    Args:
        begin: is called with MODEL_DIR when nothing of the sweep was refused, before anything is trained.

    Raises:
        UserError: a mistake in the configuration (told before anything is trained); points that have failed, after all others are
            done; a folder with something else in it.
    """
    folder, drawing = check_sweep(cfg, cells)
    jobs = plan_jobs([cell.study for cell in cells])
    check_data(cells)
    check_done(folder, jobs, cells)
    begin(folder)
    with Board(folder, cfg.claim_timeout) as board:
        failed = _Worker(cells, jobs, board, folder, drawing).work()
    if not write_results(folder, jobs, cells, drawing):
        raise UserError(f"No point of the sweep was done; {_why(failed, jobs, folder)}")
    report = write_report(folder)
    for finding in grid_findings(results.read(folder / results.RESULTS_FILE), cfg.x):
        print(finding, file=sys.stderr, flush=True)
    if failed:
        raise UserError(f"{_why(failed, jobs, folder)} The report has the others: {report}.")
    return report


def check_sweep(cfg: SweepConfig, cells: Sequence[Cell]) -> tuple[Path, Drawing]:
    """MODEL_DIR of all cells, and how they will be drawn.

    Raises:
        UserError: an axis that changes nothing; cells with several folders; a folder that holds a single run or a study; no
            file of published curves.
    """
    folders = {cell.study.base.train.model_dir for cell in cells}
    if len(folders) > 1:
        raise UserError(f"SweepConfig.axes gives the cells several MODEL_DIRs ({', '.join(sorted(folders))}); give one for all.")
    _check_axes(cells)
    folder = Path(folders.pop()).expanduser()
    run = RunFolder(str(folder))
    if run.has_progress() or (run.is_study() and not (folder / "points").is_dir()):
        raise UserError(
            f"MODEL_DIR {folder} holds {'a single run' if run.has_progress() else 'a study'}, not a sweep; give another."
        )
    axes = {axis: tuple(map(shown, values)) for axis, values in cfg.axes.items()}
    return folder, Drawing(cfg.x, axes, read_published(cfg.published) if cfg.published else ())


def shown(value: Any) -> Any:
    """An axis' value as results have it: numbers, words and tuples of them are themselves, all else what gin files say for it."""

    def plain(part: Any) -> bool:
        return isinstance(part, str | int | float | None) or (isinstance(part, tuple | list) and all(map(plain, part)))

    return value if plain(value) else " ".join(gin_literal(value).split())


def _check_axes(cells: Sequence[Cell]) -> None:
    """UserError for an axis with whose values every cell trains and scores the same."""
    keys: dict[int, set[str]] = {number: set() for number in range(len(cells))}
    for point in collect([cell.study for cell in cells]):
        for number in point.cells:
            keys[number].add(point.key)
    for axis in cells[0].axes:
        alike: dict[str, list[set[str]]] = {}
        for number, cell in enumerate(cells):
            alike.setdefault(repr({name: value for name, value in cell.axes.items() if name != axis}), []).append(keys[number])
        if any(len(group) > 1 for group in alike.values()) and all(one == group[0] for group in alike.values() for one in group):
            raise UserError(
                f"SweepConfig.axes['{axis}'] changes nothing that this study trains; take a field that does (stages have "
                "StageConfig.steps, batch_size and rules of their own), or leave it out."
            )


def check_data(cells: Sequence[Cell]) -> None:
    """`study_data.check_data` of every cell, before anything is trained.

    Raises:
        UserError: what that raises; a vocabulary that is not there.
    """
    for study in {repr(cell.study): cell.study for cell in cells}.values():
        study_data.check_data(study, load_vocabulary(find_vocabulary(study.base.backbone)))


def check_done(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell]) -> None:
    """That what is done already is of the weights and the data that are there now, of which a point's key says nothing.

    Raises:
        UserError: it is not.
    """
    done: dict[str, tuple[PipelineConfig, list[Record]]] = {}
    for point in (point for job in jobs for point in job.points):
        found = read_results(folder, point.key) or ()
        for study in (cells[number].study for number in point.cells):
            done.setdefault(_shared(study), (study, []))[1].extend(found)
    for study, records in done.values():
        if records:
            pipeline.check_kept(study, records)


def _shared(study: PipelineConfig) -> str:
    """Equal for studies that one `Lab` can do."""
    base = study.base
    tasks = study.sources, study.targets, study.zero_shot, study.test_split, study.max_test_examples
    return repr((base.backbone, base.data, base.partition, base.decode, base.train.eval_period, *tasks))


def write_results(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell], drawing: Drawing) -> int:
    """Writes `results.jsonl` of what is done so far, its first line with the drawing; returns how many lines it has.

    In one file, for another sweep in the same folder writes its own.
    """
    points = [(point, read_results(folder, point.key)) for job in jobs for point in job.points]
    collected = collect_results(points, cells)
    if collected:
        missing = [point.key for point, found in points if found is None]
        now = dataclasses.replace(drawing, missing=len(missing), failed=len(read_failures(folder, missing)))
        collected[0] = {**collected[0], "sweep": dataclasses.asdict(now)}
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in collected]
        write_text(folder / results.RESULTS_FILE, "".join(lines))
    return len(collected)


def collect_results(points: Sequence[tuple[Point, Sequence[Record] | None]], cells: Sequence[Cell]) -> list[Record]:
    """The results of all points that are done, a line for each run and each cell that has it, in the order of the cells."""
    by_cell: dict[int, list[Record]] = {}
    for point, found in points:
        for number in point.cells:
            for record in found or ():
                cell = cells[number]
                named = {**record, "run_id": f"{cell.name}: {record['run_id']}", "cell": cell.shown}
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


def _together(studies: Sequence[PipelineConfig]) -> PipelineConfig:
    """The first of the studies, whose points one job has, with the tasks of all of them."""
    sources, targets = ([task for study in studies for task in getattr(study, field)] for field in ("sources", "targets"))
    return dataclasses.replace(studies[0], sources=tuple(dict.fromkeys(sources)), targets=tuple(dict.fromkeys(targets)))


class _Worker:
    """One call's way through the jobs."""

    def __init__(self, cells: Sequence[Cell], jobs: Sequence[Job], board: Board, folder: Path, drawing: Drawing):
        self.cells, self.jobs, self.board, self.folder, self.drawing = cells, jobs, board, folder, drawing
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
        return {key: error for key, error in self.failed.items() if key not in self.finished}  # by another call, since

    def _left(self) -> list[Job]:
        over = self.finished | set(self.failed)
        return [job for job in self.jobs if any(point.key not in over for point in job.points)]

    def _look(self) -> None:
        """What anyone has done, or has tried and given up, since this call began."""
        for job in self.jobs:
            self.finished |= {p.key for p in job.points if p.key not in self.finished and self.board.results(p.key) is not None}
        new = {key: failure for key, failure in self._failures().items() if failure != self.old_failures.get(key)}
        self.failed |= {key: failure.error for key, failure in new.items() if key not in self.finished}

    def _try(self, job: Job) -> bool:
        """Do what is left of the job, and free; whether anything was."""
        over = self.finished | set(self.failed)
        missing = [point for point in job.points if point.key not in over]
        if lost := [key for point in missing for key in point.needs if key in self.failed and key not in self.finished]:
            if any(self.board.claims.is_anothers(key) for key in lost):  # who tries it again
                return False
            orphans = job.only(self.board.take(point.key for point in missing)).points
            for point in orphans:
                self._fail(point, f"What it starts from has failed: {self.failed[lost[0]]}")
            return bool(orphans)
        if not missing or not job.needs <= self.finished:
            return False
        taken = self.board.take(point.key for point in missing)
        if not taken:
            return False
        self.told_waiting = False
        try:
            self._do(job.only(taken))
        finally:
            self.board.claims.give_back(taken)
        return True

    def _do(self, job: Job) -> None:
        """Train and score points that this call has claimed. One that fails does not stop the rest.

        What fails it is in its configuration, its data or the machine; any other error is a bug, and ends the call.
        """
        try:
            self._train(job)
        except ClaimLost:
            raise
        except BadStepError as error:
            if len(job.points) == 1:
                self._fail(job.points[0], str(error))
                return
            self.say(f"{error.what} The points of this bank are trained one by one.")
            for point in job.points:
                self._do(Job((point,)))
        except (UserError, jax.errors.JaxRuntimeError, MemoryError, OSError) as error:
            left = [point for point in job.points if point.key not in self.finished]
            if not left:
                raise
            told = sentence(error)
            if told is None:
                traceback.print_exc()
                told = " ".join(str(error).split())[:1000] or type(error).__name__
            for point in left:
                self._fail(point, told)

    def _train(self, job: Job) -> None:
        stage, first = job.stage(), job.points[0]
        runs = f"{len(job.points)} prompts side by side, " if len(job.points) > 1 else ""
        tokens = spread_of_lengths(job)
        self.say(
            f"{len(self.finished)} of {self.total} points done, {duration(time.perf_counter() - self.began)} gone{self._to_go()}"
            f": {stage.title}; {runs}{f'{tokens}, ' if tokens else ''}{steps_of(job)} steps"
        )
        records = run_stage(self._lab(job), stage, f"[{len(self.finished) + 1}/{self.total}]", self.say)
        for record in records:
            results.check_record(record, f"The result {record['run_id']}")  # a metric of one's own may give a NaN
        both = list(zip(stage.scored, records, strict=True))
        for n, point in enumerate(job.points):
            self.board.finish(point.key, [record for (run, _), record in both if stage.is_source or run == n])
            self.finished.add(point.key)
        pipeline.drop_weights(self.cells[first.cells[0]].study, stage)  # only now: without results they are needed again
        self.cost_done += stage.cost({})
        write_results(self.folder, self.jobs, self.cells, self.drawing)  # `report` shows it

    def _fail(self, point: Point, error: str) -> None:
        try:
            self.board.fail(point.key, _name(point), error)
        except OSError as unwritten:  # a full disk: this call's last sentence says it all the same
            self.say(f"That cannot be written to {self.folder / 'failures'}: {unwritten.strerror}.")
        self.failed[point.key] = error
        self.say(f"failed: {_name(point)}: {error}")

    def _wait(self) -> None:
        """For others, who have claimed what is left or what it starts from."""
        if not self.told_waiting:
            self.say("waiting for other calls of this sweep, which are at work on what is left")
            self.told_waiting = True
        time.sleep(WAIT)

    def _failures(self) -> dict[str, Failure]:
        return read_failures(self.folder, [point.key for job in self.jobs for point in job.points])

    def _lab(self, job: Job) -> Lab:
        """The job's backbone, vocabulary and caches; checked against the results that its cells have."""
        cells = {point.cells[0] for point in job.points}
        study = _together([self.cells[number].study for number in sorted(cells)])
        key = _shared(study)
        if self.lab is None or self.lab[0] != key:
            self.lab = None  # give the memory back first
            recorded = [record for job in self.jobs for p in job.points if p.cells[0] in cells for record in self._results(p)]
            self.lab = (key, Lab(study, job.stage().trainings[-1], recorded, self.board.claims.check))
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
