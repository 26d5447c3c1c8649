"""Packs the pretraining runs of `mini`, in their order, into the folder that ships with the package.

    python -m tasks.mini_release RUN … LAST_RUN mpt_jax/assets/mini

Writes config.json, model.safetensors, sentencepiece.model and card.json: what mini was trained on, for how long, and how to
do it again.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

import mpt_jax
from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.config import BackboneConfig, DataConfig, T5Config
from mpt_jax.data.cache import TokenCache, mixture_tasks, open_task
from mpt_jax.data.sampling import Loader, stream_data
from mpt_jax.data.vocabulary import Vocabulary, load_vocabulary
from mpt_jax.models.t5 import count_parameters
from mpt_jax.progress import read_history
from tasks import pretrain

SUPERVISED = (
    "sketch_lesson_1 to 3 (tasks/sketch_exercises.py): recalling the partners of words, marking the words that two lists "
    "share, records from sentences and back, rewording (passive, synonyms, wider words, the contrary), questions from "
    "statements and back, the meaning of words, who acted on whom, the record that is about a name, what a record leaves "
    "open, how each field of one sentence stands to another's or a question's, what differs, whether a record follows from "
    "or is the same as a sentence or another record, whether it is among told events, what is praised or blamed and which "
    "claim weighs more, glosses of ambiguous words. No sentence of the validation and test sets of the suite's tasks, but "
    "for those of sketch_word_sense: half of them are glossed, all are told. The running text also says what follows from a "
    "third of the phrases that sketch_commitment tests, and what visitors did in the end whose like sketch_sentiment rates. "
    "Near to tasks of the suite lie: filling a record (cloze, questions), what follows from or to a record (entailment), "
    "the tone of one thing (sentiment)."
)
CREDITS = "English Wikipedia (CC BY-SA 4.0, its contributors) and novels in the public domain"


def release(runs: list[Path], target: Path) -> dict[str, Any]:
    """Writes the folder and returns its card."""
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    architecture = T5Config(**configs[-1]["backbone"]["architecture"])
    backbone = load_backbone(BackboneConfig(str(runs[-1]), architecture))
    export_hf(jax.device_get(backbone.params), architecture, target, dtype="float32")
    shutil.copyfile(backbone.vocabulary, target / "sentencepiece.model")
    vocabulary = load_vocabulary(backbone.vocabulary)
    card = {
        "name": "mini",
        "what": "a T5 1.1 small enough for a laptop, uncased; for demonstrations and tests of prompt tuning, not for use",
        "parameters": count_parameters(architecture),
        "licence": "Apache-2.0",
        "corpus": {
            "credits": CREDITS,
            "english": [_describe(path) for path in pretrain.corpus_files()],
            "generated": "running text of tasks/sketch_text.py",
            "supervised": SUPERVISED,
        },
        "stages": [_stage(run, config, vocabulary) for run, config in zip(runs, configs, strict=True)],
        "sha256": {name: _sha256(target / name) for name in ("model.safetensors", "sentencepiece.model")},
        "fingerprint": backbone.fingerprint,
        "command": "MPT_JAX_CORPUS=FOLDER make mini",
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__},
    }
    (target / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _stage(run: Path, config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    data = DataConfig(**{**config["data"], "streams": (), "task_modules": tuple(config["data"]["task_modules"])})
    steps = json.loads((run / "finished.json").read_text())["step"]
    mixture = mixture_tasks(data, data.mixture)
    caches = [open_task(data, task, data.train_split, vocabulary) for task, _ in mixture]
    losses = [record["loss"] for record in read_history(run) if record["kind"] == "train"]
    return {
        "mixture": dict(mixture),
        "steps": steps,
        "batch_size": data.batch_size,
        "tokens": _tokens(caches, [rate for _, rate in mixture], data, steps),
        "final_loss": round(sum(losses[-4:]) / len(losses[-4:]), 4),
    }


def _tokens(caches: list[TokenCache], rates: list[float], data: DataConfig, steps: int) -> int:
    """Tokens, inputs and targets, of all examples that the run has seen."""
    loader = Loader([stream_data(cache, rate=rate) for cache, rate in zip(caches, rates, strict=True)], "proportional",
                    data.batch_size, data.lengths, data.seed)  # fmt: skip
    streams, rows = (part for part in zip(*(loader.draw(step) for step in range(steps)), strict=True))
    total = 0
    for step_streams, step_rows in zip(streams, rows, strict=True):
        total += sum(len(caches[n].inputs(r)) + len(caches[n].targets(r)) for n, r in zip(step_streams, step_rows, strict=True))
    return total


def _describe(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": os.path.getsize(path), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps(release([Path(run) for run in sys.argv[1:-1]], Path(sys.argv[-1])), indent=2))
