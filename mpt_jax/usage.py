"""What `--help` prints, in general and for each command."""

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

WIDTH = 100


class Usage(NamedTuple):
    """How a command is called, what it does, and an example that can be typed."""

    call: str
    text: str
    example: str


CONFIGURATION = """\
configuration:
  --gin_file=FILE             repeatable; later files win. Bare names are found in the gin/ folder, too
  --gin.NAME=VALUE            a macro (--gin.TRAIN_STEPS=100) or a field (--gin.PromptConfig.length=20)
  --gin_search_paths=A,B      more folders in which files and their includes are looked for"""

VOCABULARY = """\
  --vocabulary=FILE           SentencePiece file, or 'bytes', in place of what lies beside the weights"""

OF_A_RUN = "--gin_file=MODEL_DIR/config.gin [--gin.NAME=VALUE …]"

GENERAL_EXAMPLE = """\
  python -m mpt_jax pipeline --gin_file=gin/studies/demo.gin
  python -m mpt_jax train --gin_file=gin/backbones/mini.gin --gin_file=gin/methods/prompt_tuning.gin \\
      --gin.MIXTURE_OR_TASK_NAME=sketch_sentiment --gin.MODEL_DIR=/tmp/run --gin.TRAIN_STEPS=500
  python -m mpt_jax show …    the same flags: what would run, and where each value comes from
  python -m mpt_jax train --help    what a command does, its flags and an example"""

USAGES = {
    "train": Usage(
        "--gin_file=FILE … [--gin.NAME=VALUE …]",
        "Trains what the gin files of gin/methods say: a prompt, a bank of prompts, or the whole model. MODEL_DIR gets "
        "config.gin (the configuration, for the other commands), metrics.jsonl, tensorboard/, checkpoints/ and, at the end, "
        "prompts.safetensors or model/. Stopped with Ctrl-C or killed, it resumes when it is called again in the same way; "
        "with more TRAIN_STEPS, a finished run goes on.",
        "  python -m mpt_jax train --gin_file=gin/backbones/mini.gin --gin_file=gin/methods/prompt_tuning.gin \\\n"
        "      --gin.MIXTURE_OR_TASK_NAME=sketch_sentiment --gin.MODEL_DIR=runs/sentiment --gin.PROMPT_LENGTH=20 "
        "--gin.TRAIN_STEPS=500",
    ),
    "evaluate": Usage(
        OF_A_RUN,
        "Scores the finished run in MODEL_DIR with each task's own metrics on DataConfig.eval_split (default: validation), "
        "prints them and writes MODEL_DIR/evaluation_<split>.json. DecodeConfig says how answers are made; "
        "TrainConfig.max_eval_examples scores a part. Prompts of one task that differ only in their seed are scored as an "
        "ensemble, too: their average, the best one, the majority vote and, ranking, the mean log-likelihood.",
        "  python -m mpt_jax evaluate --gin_file=runs/sentiment/config.gin --gin.DecodeConfig.method=rank",
    ),
    "infer": Usage(
        f"{OF_A_RUN} \\\n      --gin.InferConfig.input_file=IN --gin.InferConfig.output_file=OUT",
        "Predicts for each line of a JSONL file: an object with the finished text in 'inputs', or with the fields of its task as "
        "in the training data; and the name of the task in 'task', which may be missing where the run has a single prompt. Each "
        "line is written with 'prediction' and 'score', its log-probability.",
        """  echo '{"inputs": "review: the soup was bland."}' > in.jsonl\n"""
        "  python -m mpt_jax infer --gin_file=runs/sentiment/config.gin --gin.InferConfig.input_file=in.jsonl \\\n"
        "      --gin.InferConfig.output_file=out.jsonl",
    ),
    "import": Usage(
        "SRC DST [--vocabulary=FILE]",
        "Converts a backbone once: a T5X checkpoint or a Hugging Face folder, local or in a bucket (gs://), becomes a new local "
        "folder that is checked at each load. DST is then an INITIAL_CHECKPOINT_PATH. No gin file is needed.",
        "  python -m mpt_jax import t5-xl-lm-adapt xl",
    ),
    "export": Usage(
        f"{OF_A_RUN} --gin.ExportConfig.output=PATH\n       python -m mpt_jax export SRC DST [--vocabulary=FILE]",
        "The first form writes the prompts of MODEL_DIR, or one task's (ExportConfig.task), in the form that ExportConfig.format "
        "names: safetensors, npy, t5x, peft or peft_mpt. The second writes a backbone as a Hugging Face folder for "
        "transformers. What is there already is never written over.",
        "  python -m mpt_jax export --gin_file=runs/sentiment/config.gin --gin.ExportConfig.format=peft \\\n"
        "      --gin.ExportConfig.output=adapter",
    ),
    "inspect": Usage(
        OF_A_RUN,
        "Tells of each prompt in MODEL_DIR how far its tokens have gone from their start, which pieces of the vocabulary are "
        "nearest to them, how alike these are, and where class labels are among them; of a bank of prompts also how similar they "
        "are, by both measures of SPoT. Writes all of it as MODEL_DIR/inspect.json, and for a bank figures/similarity.png.",
        "  python -m mpt_jax inspect --gin_file=runs/sentiment/config.gin --gin.InspectConfig.neighbours=5",
    ),
    "pipeline": Usage(
        "--gin_file=FILE … [--gin.NAME=VALUE …]",
        "Runs a whole study: a teacher for each source task, MPT's source training, then every target by every method for each k "
        "and seed, and a report. MODEL_DIR gets results.jsonl, report.html and runs/, with a config.gin in each run. It "
        "continues where it was stopped; with more seeds, targets or methods, only what is new is trained.",
        "  python -m mpt_jax pipeline --gin_file=gin/studies/demo.gin --gin.MODEL_DIR=runs/mine",
    ),
    "sweep": Usage(
        "[--dry-run [--topology=NAME]] --gin_file=FILE … [--gin.NAME=VALUE …]",
        "Runs the study of the gin files with every combination of the values in SweepConfig.axes, and a report with curves "
        "along SweepConfig.x. Prompts of one backbone are trained side by side, whatever their length, start, rate, task and "
        "seed. The same command again, here or on other machines that share MODEL_DIR, helps with what is left: no two do the "
        "same point, and those of a call that died are taken over. A point that fails is recorded, and the rest goes on. With "
        "--dry-run only says what would be done and what it costs.",
        "  python -m mpt_jax sweep --gin_file=gin/studies/lengths_mini.gin --dry-run",
    ),
    "plan": Usage(
        "--topology=NAME --gin_file=FILE … [--gin.NAME=VALUE …]",
        "Tells, before a machine is rented, what a run needs of it: the memory of a device by kind, whether the run fits and "
        "what would make it fit, what goes over the links, how long a step and the run take at best and likely. For a TPU slice "
        "(v4, v5e, v5p, v6e, by its shape in chips) its own compiler, libtpu, compiles the real step; GPUs (l4, a100-40gb, a100, "
        "h100, h200, b200, and how many) are estimated. No device and no checkpoint is needed; batches are taken as padded.",
        "  python -m mpt_jax plan --topology=v5e:2x4 --gin_file=gin/backbones/t5_1_1_xxl.gin \\\n"
        "      --gin_file=gin/methods/prompt_tuning.gin --gin.MIXTURE_OR_TASK_NAME=sketch_sentiment --gin.TRAIN_STEPS=30000 \\\n"
        "      --gin.PartitionConfig.num_partitions=8",
    ),
    "bench": Usage(
        "--gin_file=FILE … [--gin.NAME=VALUE …]",
        "Measures training and decoding on the devices that are here, with random weights and tokens: examples per second, a "
        "step's time and its spread, the share of the peak, the first step with its compilation, peak memory. "
        "BenchConfig.output_file takes all of it as JSON.",
        "  python -m mpt_jax bench --gin_file=gin/backbones/t5_1_1_base.gin --gin_file=gin/methods/prompt_tuning.gin \\\n"
        "      --gin.MIXTURE_OR_TASK_NAME=sketch_sentiment --gin.TRAIN_STEPS=1",
    ),
    "report": Usage(
        "--model_dir=DIR",
        "Writes report.html, report.md and figures/ of a study again, from its results.jsonl.",
        "  python -m mpt_jax report --model_dir=runs/demo",
    ),
    "tasks": Usage(
        "[NAME] [--gin_file=FILE …] [--gin.NAME=VALUE …]",
        "Lists the tasks and mixtures of DataConfig.task_modules and own_tasks, or those with NAME in theirs. With the very name "
        "of a task, shows its source, splits, metrics, lengths, labels and some examples as text and tokens; the vocabulary is "
        "that of mini, or with a gin file of its backbone.",
        "  python -m mpt_jax tasks sketch_sentiment",
    ),
    "show": Usage(
        "--gin_file=FILE … [--gin.NAME=VALUE …] [--changed]",
        "Prints what another command with the same flags would run with: every value of the configuration and where it comes "
        "from. Nothing is run.",
        "  python -m mpt_jax show --gin_file=gin/studies/demo.gin --changed",
    ),
}

FLAGS = {
    "report": "flags:\n  --model_dir=DIR             the study's folder; instead of it, gin flags as of pipeline",
    "plan": f"{CONFIGURATION}\n\nflags:\n  --topology=NAME             v5e:2x4, v4:2x2x2, h100, h100:8 …",
    "import": f"flags:\n{VOCABULARY}",
    "export": f"{CONFIGURATION}\n\nflags of the second form:\n{VOCABULARY}",
    "sweep": f"{CONFIGURATION}\n\nflags:\n  --dry-run                   train nothing\n"
    "  --topology=NAME             with --dry-run: tells time and memory on these devices, named as in plan",
    "show": f"{CONFIGURATION}\n\nflags:\n  --changed                   only the values that differ from their defaults",
}


def of(command: str, summaries: Mapping[str, str]) -> str:
    """The help for a command or, for "", for all; `summaries` has a line on each."""
    if not command:
        lines = "\n".join(f"  {name:<10}{summary}" for name, summary in summaries.items())
        return (
            "usage: python -m mpt_jax COMMAND [--gin_file=FILE …] [--gin.NAME=VALUE …]\n\n"
            f"Multitask prompt tuning of a frozen T5.\n\ncommands:\n{lines}\n\n{CONFIGURATION}\n\nexamples:\n{GENERAL_EXAMPLE}"
        )
    usage = USAGES[command]
    text = textwrap.fill(usage.text, WIDTH, break_on_hyphens=False)
    flags = FLAGS.get(command, CONFIGURATION)
    return f"usage: python -m mpt_jax {command} {usage.call}\n\n{text}\n\n{flags}\n\nexample:\n{usage.example}"
