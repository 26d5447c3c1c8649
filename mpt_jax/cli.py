"""The command line: reads the configuration, calls one function, and turns a user's mistake into one sentence.

Nothing heavy is imported before a command needs it, so that `show` and `--help` answer at once.
"""

import argparse
import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from mpt_jax import __version__
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import Experiment, PipelineConfig, nearest, to_dict
from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.gin_bindings import Parsed, gin_literal, parse
from mpt_jax.resolve import DEFAULT, Setting

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

EPILOG = """\
configuration:
  --gin_file=FILE             repeatable; later files win. Bare names are found in the gin/ folder, too
  --gin.NAME=VALUE            a macro (--gin.TRAIN_STEPS=100) or a field (--gin.PromptConfig.length=20)
  --gin_search_paths=A,B      more folders in which files and their includes are looked for

examples:
  python -m mpt_jax pipeline --gin_file=gin/studies/demo.gin
  python -m mpt_jax train --gin_file=gin/backbones/mini.gin --gin_file=gin/methods/prompt_tuning.gin \\
      --gin.MIXTURE_OR_TASK_NAME=sketch_sentiment --gin.MODEL_DIR=/tmp/run --gin.TRAIN_STEPS=500
  python -m mpt_jax show …    the same flags: what would run, and where each value comes from
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's C++ chatter, before anything imports it
    _configure_logging()
    try:
        arguments = _parse_arguments(argv)
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(f"\nInterrupted. To go on from the last checkpoint: {_command_line(argv)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while writing a file'}. Mend that and run the same command again.")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _command_line(argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "mpt_jax", *argv])


def _configure_logging() -> None:
    """mpt_jax's own messages at INFO, everybody else's from WARNING, both plain on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mpt_jax").setLevel(logging.INFO)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m mpt_jax --help.")


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _ArgumentParser(
        prog="python -m mpt_jax",
        usage="python -m mpt_jax COMMAND [--gin_file=FILE …] [--gin.NAME=VALUE …]",
        description="Multitask prompt tuning of a frozen T5.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = "\n".join(f"{name:<10}{command.help}" for name, command in COMMANDS.items())
    parser.add_argument("command", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--gin_search_paths", action="append", default=[], metavar="A,B", help=argparse.SUPPRESS)
    parser.add_argument(
        "--model_dir", default="", metavar="DIR", help="the run's folder (report only; elsewhere --gin.MODEL_DIR)"
    )
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--vocabulary", default="", metavar="FILE", help="SentencePiece file or 'bytes' (import and export SRC DST only)"
    )
    parser.add_argument(
        "--topology", default="", metavar="NAME", help="devices that plan is for: v5e:2x4, v4:2x2x2, h100:8 … (plan only)"
    )
    parser.add_argument("--version", action="version", version=f"mpt_jax {__version__}")
    parser.epilog = f"commands:\n  {commands.replace(chr(10), chr(10) + '  ')}\n\n{EPILOG}"
    if not argv:
        argv = ["--help"]
    arguments = parser.parse_args([item for item in argv if not item.startswith("--gin.")])
    arguments.bindings = [item.removeprefix("--gin.") for item in argv if item.startswith("--gin.")]
    arguments.search_paths = [path for paths in arguments.gin_search_paths for path in paths.split(",") if path]
    if arguments.command not in COMMANDS:
        hint = nearest(arguments.command, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command '{arguments.command}'.{hint}")
    if arguments.paths and arguments.command not in ("import", "export"):
        raise UserError(f"{arguments.command} takes no '{arguments.paths[0]}'; see python -m mpt_jax --help.")
    if arguments.model_dir and arguments.command != "report":
        raise UserError(f"--model_dir is for report; give {arguments.command} --gin.MODEL_DIR={arguments.model_dir}.")
    return arguments


def _configuration(arguments: argparse.Namespace) -> Parsed:
    if not arguments.gin_file:
        raise UserError(f"{arguments.command} needs at least one --gin_file=FILE, such as gin/studies/demo.gin.")
    return parse(arguments.gin_file, arguments.bindings, arguments.search_paths)


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
    parsed = _configuration(arguments)
    experiment = parsed.experiment()
    # Refuses a folder that holds another run, before its config.gin changes.
    RunFolder(experiment.train.model_dir).begin(experiment)
    write_config(parsed.config_gin(Experiment), experiment, experiment.train.model_dir)
    from mpt_jax.train import run_training

    result = run_training(experiment)
    print(
        f"Done. Files are in {experiment.train.model_dir}"
        + (f"; prompts in {result.prompts_path}" if result.prompts_path else "")
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    experiment = _configuration(arguments).experiment()
    from mpt_jax.evaluate import run_evaluate

    run_evaluate(experiment)


def _infer(arguments: argparse.Namespace) -> None:
    experiment = _configuration(arguments).experiment()
    from mpt_jax.infer import run_infer

    run_infer(experiment)


def _import(arguments: argparse.Namespace) -> None:
    if len(arguments.paths) != 2:
        raise UserError("import needs two paths: import SRC DST (a checkpoint, and the new folder).")
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


def _pipeline(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    config = parsed.pipeline()
    from mpt_jax.pipeline import check_study, run_pipeline

    check_study(config)  # refuses a folder that holds another study, before its config.gin changes
    write_config(parsed.config_gin(PipelineConfig), config, config.base.train.model_dir)
    _say_where_the_report_is(run_pipeline(config))


def _plan(arguments: argparse.Namespace) -> None:
    if not arguments.topology:
        raise UserError("plan needs the devices that it is for: --topology=v5e:2x4, v4:2x2x2, h100:8 …")
    parsed = _configuration(arguments)
    for macro in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH"):
        parsed.fill(macro, "none")  # nothing is read or written
    experiment = parsed.experiment()
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a device, and looking for one takes time
    from mpt_jax.plan import describe, make_plan

    print(describe(make_plan(experiment, arguments.topology)))


def _bench(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    for macro in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH"):
        parsed.fill(macro, "none")  # nothing is read; one file is written, BenchConfig.output_file
    experiment = parsed.experiment()
    from mpt_jax.bench import run_bench

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
    from mpt_jax.studies.report import write_report

    _say_where_the_report_is(write_report(folder))


def _say_where_the_report_is(page: Path) -> None:
    print(f"Report: {page}  (as text: {page.with_suffix('.md').name}, as data: results.jsonl)")


def _show(arguments: argparse.Namespace) -> None:
    parsed = _configuration(arguments)
    settings = parsed.provenance()
    print(f"# {' + '.join([*parsed.files, *(f'--gin.{binding}' for binding in arguments.bindings)])}")
    print_settings(settings, sys.stdout)


def print_settings(settings: dict[str, Setting], out: TextIO) -> None:
    """The resolved configuration, one section for each object, each value with its origin; defaults are dim on a terminal."""
    color = out.isatty() and "NO_COLOR" not in os.environ
    dim, bold, reset = ("\033[2m", "\033[1m", "\033[0m") if color else ("", "", "")
    parents = {".".join(path.split(".")[:depth]) for path in settings for depth in range(1, path.count(".") + 1)}
    leaves = {path: setting for path, setting in settings.items() if path not in parents}
    sections: dict[tuple[str, str], list[tuple[str, Setting]]] = {}
    for path, setting in leaves.items():
        place, _, field = path.rpartition(".")
        sections.setdefault((place, setting.owner), []).append((field, setting))
    width = max(len(field) for _, rows in sections.items() for field, _ in rows)
    for (place, owner), rows in sections.items():
        print(f"\n{bold}{owner}{reset}" + (f"  ({place})" if place else ""), file=out)
        for field, setting in rows:
            first, *rest = gin_literal(setting.value).split("\n")
            style, end = (dim, reset) if setting.origin == DEFAULT else ("", "")
            print(f"{style}  {field:<{width}} = {first:<30}  # {setting.origin}{end}", file=out)
            for line in rest:
                print(f"{style}  {line}{end}", file=out)
    bound = [setting for setting in leaves.values() if setting.origin != DEFAULT]
    flags = sum(setting.origin.startswith("--gin.") for setting in bound)
    print(f"\n{len(bound) - flags} values from files, {flags} from flags, {len(leaves) - len(bound)} defaults.", file=out)


class _Command(NamedTuple):
    run: Callable[[argparse.Namespace], Any]
    help: str


COMMANDS = {
    "train": _Command(_train, "train prompts (or, with model_tuning, the whole model); the same command again resumes"),
    "evaluate": _Command(_evaluate, "score the run in MODEL_DIR on each task's evaluation split"),
    "infer": _Command(_infer, "InferConfig.input_file (JSONL with a task name) → InferConfig.output_file"),
    "import": _Command(_import, "SRC DST: any T5 checkpoint → a folder that loads fast and is checked at each load"),
    "export": _Command(_export, "the prompts in MODEL_DIR → ExportConfig.output; or SRC DST: a backbone → a Hugging Face folder"),
    "pipeline": _Command(_pipeline, "teachers → source training → every target by every method → report"),
    "plan": _Command(_plan, "--topology=NAME: memory, communication and time of a run on devices that need not be there"),
    "bench": _Command(_bench, "speed of training and decoding on the devices that are here, with random weights and tokens"),
    "report": _Command(_report, "rewrite report.md and report.html from results.jsonl in --model_dir"),
    "show": _Command(_show, "print the resolved configuration and where each value comes from"),
}
