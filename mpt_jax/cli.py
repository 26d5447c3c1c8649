"""The command line: reads the configuration, calls one function, and turns a user's mistake into one sentence.

Nothing heavy is imported before a command needs it, so that `show` and `--help` answer at once.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from mpt_jax import __version__, signals, usage
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import Experiment, PipelineConfig, SweepConfig, check_local, nearest, to_dict
from mpt_jax.errors import UserError, sentence
from mpt_jax.files import write_text
from mpt_jax.gin_bindings import Parsed, parse, parse_cells
from mpt_jax.gin_text import gin_literal
from mpt_jax.quiet import leave_libtpu_alone
from mpt_jax.resolve import DEFAULT, Setting, is_default

EXIT_USER_ERROR = 2
COMMAND_VARIABLE = "MPT_JAX_COMMAND"  # set by `make demo`: how to call it, not us, again


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 or 143 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's C++ chatter, before anything imports it
    leave_libtpu_alone()
    _configure_logging()
    last_words = f"\nInterrupted. To go on from the last checkpoint: {resuming_command(argv)}"
    try:
        arguments = _parse_arguments(argv)
        if arguments.help:
            summaries = {name: command.help for name, command in COMMANDS.items()}
            print(usage.of(arguments.command, summaries))
            return 0
        with signals.handled(last_words):
            COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupted:
        print(last_words, file=sys.stderr)
        return signals.exit_code(getattr(interrupted, "number", signal.SIGINT))
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def resuming_command(argv: Sequence[str]) -> str:
    """What a shell takes to do the same again: that of `make demo`, say, which sets more than arguments."""
    return os.environ.get(COMMAND_VARIABLE) or shlex.join(["python", "-m", "mpt_jax", *argv])


def _configure_logging() -> None:
    """mpt_jax's own messages at INFO, everybody else's from WARNING, both plain on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mpt_jax").setLevel(logging.INFO)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m mpt_jax --help.")


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `command` is "" where none is named, which is fine with `help` only."""
    parser = _ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="version", version=f"mpt_jax {__version__}")
    parser.add_argument("--gin_file", action="append", default=[])
    parser.add_argument("--gin_search_paths", action="append", default=[])
    parser.add_argument("--model_dir", default="")
    parser.add_argument("--vocabulary", default="")
    parser.add_argument("--topology", default="")
    parser.add_argument("--changed", action="store_true")
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    arguments = parser.parse_intermixed_args([item for item in argv if not item.startswith("--gin.")])
    arguments.help |= not argv
    arguments.bindings = [item.removeprefix("--gin.") for item in argv if item.startswith("--gin.")]
    arguments.search_paths = [path for paths in arguments.gin_search_paths for path in paths.split(",") if path]
    name = arguments.command
    if not name and not arguments.help:
        raise UserError(f"No command is given; there are {', '.join(COMMANDS)}.")
    if name and name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command '{name}'.{hint}")
    if arguments.paths and name not in ("import", "export", "tasks"):
        raise UserError(f"{name} takes no '{arguments.paths[0]}'; see python -m mpt_jax {name} --help.")
    if arguments.model_dir and name != "report":
        raise UserError(f"--model_dir is for report; give {name} --gin.MODEL_DIR={arguments.model_dir}.")
    if arguments.vocabulary and not (arguments.paths and name in ("import", "export")):
        raise UserError(f"--vocabulary is for import and export SRC DST; give {name} --gin.BackboneConfig.vocabulary.")
    for flag, given, users in (
        ("--topology", arguments.topology, ("plan", "sweep")),
        ("--changed", arguments.changed, ("show",)),
        ("--dry-run", arguments.dry_run, ("sweep",)),
    ):
        if given and name not in users:
            raise UserError(f"{flag} is for {' and '.join(users)}, not for {name}.")
    if name == "sweep" and arguments.topology and not arguments.dry_run:
        raise UserError(f"sweep trains on this machine; --topology={arguments.topology} is for its --dry-run; give both or none.")
    return arguments


def _configuration(arguments: argparse.Namespace) -> Parsed:
    if not arguments.gin_file:
        raise UserError(f"{arguments.command} needs at least one --gin_file=FILE, such as gin/studies/demo.gin.")
    return parse(arguments.gin_file, arguments.bindings, arguments.search_paths)


def _of_one_run(arguments: argparse.Namespace, instead: str) -> Parsed:
    """The configuration of a command that would take a study for its base, a run that no one asked for."""
    parsed = _configuration(arguments)
    if parsed.binds(PipelineConfig):
        raise UserError(
            f"{arguments.command} is for one run, and {arguments.gin_file[-1]} sets PipelineConfig, a study of many; {instead}"
        )
    return parsed


def write_config(text: str, config: Any, model_dir: str) -> None:
    """Writes `<model_dir>/config.gin` and config.json; a config.gin that says something else is kept as config.1.gin …

    Raises `UserError` where the folder cannot be written.
    """
    folder = Path(model_dir).expanduser()
    path = folder / "config.gin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            number = next(n for n in range(1, 10**6) if not (folder / f"config.{n}.gin").exists())
            path.rename(folder / f"config.{number}.gin")
        write_text(path, text)
        write_text(folder / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"Cannot write into MODEL_DIR '{folder}' ({error.strerror}); give a folder that you may write to."
        ) from None


def _train(arguments: argparse.Namespace) -> None:
    parsed = _of_one_run(arguments, "call pipeline or sweep with the same files.")
    experiment = parsed.experiment()
    if experiment.train.steps == 0:  # of a study's base, which trains nothing itself, it may be
        raise UserError("TrainConfig.steps (TRAIN_STEPS) is 0, so nothing would be trained; give the number of steps.")
    from mpt_jax import distributed

    with distributed.joined(experiment.distributed):
        if distributed.is_first():
            # Refuses a folder that holds another run, before its config.gin changes.
            RunFolder(experiment.train.model_dir).begin(experiment)
            write_config(parsed.config_gin(Experiment), experiment, experiment.train.model_dir)
        from mpt_jax.train import run_training

        result = run_training(experiment)
        if distributed.is_first():
            what = "the tuned model" if experiment.prompt.method == "none" else "prompts"
            print(f"Done. Files are in {experiment.train.model_dir}; {what} in {result.path}")


def _evaluate(arguments: argparse.Namespace) -> None:
    experiment = _configuration(arguments).experiment()
    from mpt_jax import distributed
    from mpt_jax.evaluate import run_evaluate

    with distributed.joined(experiment.distributed):
        run_evaluate(experiment)


def _infer(arguments: argparse.Namespace) -> None:
    experiment = _configuration(arguments).experiment()
    from mpt_jax import distributed
    from mpt_jax.infer import run_infer

    with distributed.joined(experiment.distributed):
        run_infer(experiment)


def _import(arguments: argparse.Namespace) -> None:
    if len(arguments.paths) != 2:
        raise UserError("import needs two paths: import SRC DST (a checkpoint, and the new folder).")
    if arguments.gin_file or arguments.bindings:
        raise UserError("import takes no gin flags; give import SRC DST, and --vocabulary where the source has none.")
    from mpt_jax.convert import run_import

    source, target = arguments.paths
    run_import(source, target, arguments.vocabulary)


def _export(arguments: argparse.Namespace) -> None:
    """Prompts as `ExportConfig` says or, with two paths, a whole backbone."""
    if arguments.paths:
        if len(arguments.paths) != 2 or arguments.gin_file or arguments.bindings:
            raise UserError("export takes either gin flags, for prompts, or two paths, for a backbone: export SRC DST.")
        from mpt_jax.convert import run_export_model

        source, target = arguments.paths
        run_export_model(source, target, arguments.vocabulary)
        return
    experiment = _configuration(arguments).experiment()
    from mpt_jax.export import run_export

    run_export(experiment)


def _inspect(arguments: argparse.Namespace) -> None:
    experiment = _configuration(arguments).experiment()
    from mpt_jax import distributed
    from mpt_jax.studies.inspection import run_inspect

    distributed.refuse(experiment.distributed, "inspect")
    run_inspect(experiment)


def _pipeline(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    if parsed.binds(SweepConfig):
        raise UserError(f"{arguments.gin_file[-1]} sets SweepConfig, whose axes pipeline would ignore; run it with sweep.")
    config = parsed.pipeline()
    from mpt_jax import distributed
    from mpt_jax.pipeline import run_pipeline

    distributed.refuse(config.base.distributed, "pipeline")
    text = parsed.config_gin(PipelineConfig)
    # A call that is refused leaves the config.gin of the study that is there.
    page = run_pipeline(config, begin=lambda: write_config(text, config, config.base.train.model_dir))
    _say_where_the_report_is(page)


def _sweep(arguments: argparse.Namespace) -> None:
    """Every cell is resolved before anything is trained."""
    flags = {own: [f for f in arguments.bindings if f.startswith("SweepConfig.") == own] for own in (True, False)}
    arguments.bindings = flags[True]
    parsed = _configuration(arguments)
    if not parsed.binds(SweepConfig):
        raise UserError(f"{arguments.gin_file[-1]} has no axes; set SweepConfig.axes, or run it with pipeline.")
    config = parsed.sweep()
    try:
        read = list(parse_cells(config.axes, arguments.gin_file, flags[False], arguments.search_paths))
        studies = [cell.pipeline() for _, cell in read]
    except UserError as error:
        text = str(error)
        for axis in config.axes:
            text = text.replace(f"--gin.{axis}:", f"SweepConfig.axes['{axis}']:").replace(
                f"--gin.{axis} ", f"SweepConfig.axes['{axis}'] "
            )
        raise UserError(text) from None
    from mpt_jax import distributed
    from mpt_jax.sweep import Cell, check_sweep, run_sweep

    cells = [Cell(axes, study) for (axes, _), study in zip(read, studies, strict=True)]
    distributed.refuse(cells[0].study.base.distributed, "sweep")
    if arguments.dry_run:
        from mpt_jax.sweep_cost import describe

        folder, _ = check_sweep(config, cells)
        print(describe(cells, folder, arguments.topology))
        return

    def write_cells(folder: Path) -> None:  # a call that is refused leaves those of the sweep that is there
        for number, ((_, cell), (_, study)) in enumerate(zip(read, cells, strict=True)):
            write_config(cell.config_gin(PipelineConfig), study, str(folder / "cells" / f"{number:03d}"))
        for old in (folder / "cells").iterdir():  # of a larger grid that was here before
            if old.name.isdecimal() and int(old.name) >= len(cells):
                shutil.rmtree(old, ignore_errors=True)

    _say_where_the_report_is(run_sweep(config, cells, write_cells))


def _plan(arguments: argparse.Namespace) -> None:
    if not arguments.topology:
        raise UserError("plan needs the devices that it is for: --topology=v5e:2x4, v4:2x2x2, h100:8 …")
    parsed = _of_one_run(arguments, f"sweep --dry-run --topology={arguments.topology} with the same files tells of all its jobs.")
    parsed.supply(dict.fromkeys(("MODEL_DIR", "INITIAL_CHECKPOINT_PATH"), "none"))  # nothing is read or written
    experiment = parsed.experiment()
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a device, and looking for one takes time
    from mpt_jax.plan import describe, make_plan

    print(describe(make_plan(experiment, arguments.topology)))


def _bench(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    parsed.supply(dict.fromkeys(("MODEL_DIR", "INITIAL_CHECKPOINT_PATH"), "none"))  # nothing is read or trained
    experiment = parsed.experiment()
    from mpt_jax import distributed
    from mpt_jax.bench import run_bench

    distributed.refuse(experiment.distributed, "bench")
    run_bench(experiment)


def _report(arguments: argparse.Namespace) -> None:
    """The folder is --model_dir, else MODEL_DIR of the flags, else that of the gin files."""
    flags = dict(binding.partition("=")[::2] for binding in arguments.bindings)
    folder = arguments.model_dir
    if not folder and not arguments.gin_file and set(flags) == {"MODEL_DIR"}:
        folder = flags["MODEL_DIR"].strip("'\"")
    if not folder and arguments.gin_file:
        parsed = _configuration(arguments)
        config = parsed.resolve().config
        folder = (config.base if isinstance(config, PipelineConfig) else config).train.model_dir
    if not folder:
        raise UserError("report needs the folder of a run: --model_dir=DIR.")
    check_local("--model_dir", folder)
    from mpt_jax.studies.report import write_report

    _say_where_the_report_is(write_report(folder))


def _say_where_the_report_is(page: Path) -> None:
    print(f"Report: {page}  (as text: {page.with_suffix('.md').name}, as data: results.jsonl)")


def _tasks(arguments: argparse.Namespace) -> None:
    """A list of tasks, or one of them as a run with these flags sees it; without a gin file as `mini` does."""
    if len(arguments.paths) > 1:
        raise UserError(f"tasks takes one NAME, not {' '.join(arguments.paths)}.")
    name = "".join(arguments.paths)
    parsed = parse(arguments.gin_file or ["gin/backbones/mini.gin"], arguments.bindings, arguments.search_paths)
    parsed.supply({"MIXTURE_OR_TASK_NAME": name, "MODEL_DIR": "-", "TRAIN_STEPS": 0})  # which it does not use
    config = parsed.resolve().config
    base = config.base if isinstance(config, PipelineConfig) else config
    from mpt_jax.browse import run_tasks

    run_tasks(base.data, base.backbone, name)


def _show(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    settings = parsed.provenance() | (parsed.provenance(SweepConfig) if parsed.binds(SweepConfig) else {})
    print(f"# {' + '.join([*parsed.files, *(f'--gin.{binding}' for binding in arguments.bindings)])}")
    print_settings(settings, sys.stdout, changed=arguments.changed)


def print_settings(settings: dict[str, Setting], out: TextIO, *, changed: bool = False) -> None:
    """The resolved configuration, one section for each object, each value with its origin; defaults are dim on a terminal.

    With `changed`, only what differs from its default (what has none always does).
    """
    color = out.isatty() and "NO_COLOR" not in os.environ
    dim, bold, reset = ("\033[2m", "\033[1m", "\033[0m") if color else ("", "", "")
    parents = {".".join(path.split(".")[:depth]) for path in settings for depth in range(1, path.count(".") + 1)}
    leaves = {path: setting for path, setting in settings.items() if path not in parents}
    bound = [setting for setting in leaves.values() if setting.origin != DEFAULT]
    flags = sum(setting.origin.startswith("--gin.") for setting in bound)
    total = f"{len(bound) - flags} values from files, {flags} from flags, {len(leaves) - len(bound)} defaults."
    if changed:
        shown = {path: setting for path, setting in leaves.items() if not is_default(path, setting)}
        total += f" {len(shown)} differ from their defaults."
        leaves = shown
    sections: dict[tuple[str, str], list[tuple[str, Setting]]] = {}
    for path, setting in leaves.items():
        place, _, field = path.rpartition(".")
        sections.setdefault((place, setting.owner), []).append((field, setting))
    width = max((len(field) for rows in sections.values() for field, _ in rows), default=0)
    for (place, owner), rows in sections.items():
        print(f"\n{bold}{owner}{reset}" + (f"  ({place})" if place else ""), file=out)
        for field, setting in rows:
            first, *rest = gin_literal(setting.value).split("\n")
            style, end = (dim, reset) if setting.origin == DEFAULT else ("", "")
            print(f"{style}  {field:<{width}} = {first:<30}  # {setting.origin}{end}", file=out)
            for line in rest:
                print(f"{style}  {line}{end}", file=out)
    print(f"\n{total}", file=out)


class _Command(NamedTuple):
    run: Callable[[argparse.Namespace], Any]
    help: str


COMMANDS = {
    "train": _Command(_train, "train prompts (or, with model_tuning, the whole model); the same command again resumes"),
    "evaluate": _Command(_evaluate, "score the run in MODEL_DIR on each task's evaluation split"),
    "infer": _Command(_infer, "InferConfig.input_file (JSONL with a task name) → InferConfig.output_file"),
    "import": _Command(_import, "SRC DST: any T5 checkpoint → a folder that is checked at each load"),
    "export": _Command(_export, "the prompts in MODEL_DIR → ExportConfig.output; or SRC DST: a backbone → a Hugging Face folder"),
    "inspect": _Command(_inspect, "the prompts in MODEL_DIR: nearest pieces, drift from their start, similarity to one another"),
    "pipeline": _Command(_pipeline, "teachers → source training → every target by every method → report"),
    "sweep": _Command(_sweep, "a grid of studies, packed into banks; several calls share one; --dry-run: what it would do"),
    "plan": _Command(_plan, "--topology=NAME: memory, communication and time of a run on devices that need not be there"),
    "bench": _Command(_bench, "speed of training and decoding on the devices that are here, with random weights and tokens"),
    "report": _Command(_report, "rewrite report.md and report.html from results.jsonl in --model_dir"),
    "tasks": _Command(_tasks, "[NAME]: lists the tasks; or one task's examples, lengths, labels and metrics"),
    "show": _Command(_show, "print the resolved configuration and where each value comes from"),
}
