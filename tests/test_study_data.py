"""Whether what a study's prompts start from is there, before anything is trained."""

import dataclasses
from pathlib import Path

import pytest
import study
import tiny

from mpt_jax import cli
from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.config import RetrievalConfig, StageConfig, SweepConfig
from mpt_jax.data.registry import writes_free_text
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.pipeline import run_pipeline
from mpt_jax.stages import plan
from mpt_jax.study_data import check_data
from mpt_jax.sweep import Cell, run_sweep

WORDS = r"Task 'tiny_free' has no class labels .* name words .* PromptConfig\.init_labels_of\['tiny_free'\]"
FREE_TEXT = dict.fromkeys(("record_attempt", "wsc_t5", "squad_prompt_tuning", "xsum_t5", "goemotions_t5"), True)
FREE_TEXT |= dict.fromkeys(
    ("wsc_attempt", "rte_prompt_tuning", "multirc_attempt", "stsb_t5", "winogrande_t5", "tiny_free"), False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("study_data"))


def config(folder: Path, run: str, init: str = "labels", words: dict | None = None, **changes):
    """Prompt tuning on one target with class labels, and one without."""
    stage = StageConfig(1, 4, study.PLAIN)
    fields = {"k_shots": (0,), "targets": ("tiny_mood", "tiny_free"), "full_data": {"prompt_tuning": stage}} | changes
    cfg = study.pipeline(folder, run, **fields)
    return dataclasses.replace(cfg, base=tiny.replace(cfg.base, prompt={"init": init, "init_labels_of": words or {}}))


def check(cfg) -> None:
    check_data(cfg, load_vocabulary(find_vocabulary(cfg.base.backbone)))


def test_an_impossible_start_is_told_before_anything_is_trained(folder):
    cfg = config(folder, "study")
    with pytest.raises(UserError, match=WORDS):
        run_pipeline(cfg)
    cells = [Cell({"PROMPT_LENGTH": 4}, config(folder, "study", init="vocab")), Cell({"PROMPT_LENGTH": 4}, cfg)]
    with pytest.raises(UserError, match=WORDS):
        run_sweep(SweepConfig(axes={"PROMPT_LENGTH": (4,)}), cells)
    assert not (folder / "study" / "runs").exists()


def test_words_of_a_task_or_another_start_mend_it(folder):
    check(config(folder, "mended", words={"tiny_free": ("red",)}))
    check(config(folder, "mended", init="vocab"))
    check(config(folder, "mended", targets=("tiny_mood",)))
    check(config(folder, "mended", full_data={"prompt_tuning": StageConfig(1, 4, study.PLAIN, init="vocab")}))


def test_only_stages_whose_prompts_start_from_labels_are_asked(folder):
    """The sources', those that a stage's `init` names, and those that SPoT trains besides; not models and prompts from files."""
    mood, mpt, spot = {"targets": ("tiny_mood",)}, study.pipeline(folder).few_shot["mpt"], StageConfig(1, 4, study.PLAIN)
    sources = {"sources": ("tiny_colour", "tiny_free"), "full_data": {"mpt": mpt}, "distill": False}
    with pytest.raises(UserError, match=WORDS):
        check(config(folder, "asked", **mood, **sources))
    check(config(folder, "asked", **mood, **sources, source=dataclasses.replace(study.pipeline(folder).source, init="uniform")))
    labels = dataclasses.replace(study.pipeline(folder).source, init="labels")
    with pytest.raises(UserError, match=WORDS):
        check(config(folder, "asked", init="vocab", **mood, **sources, source=labels))
    check(config(folder, "asked", full_data={"model_tuning": spot, "spot": spot}))
    retrieval = RetrievalConfig(by="per_token", stages={"embedding": spot})
    with pytest.raises(UserError, match=WORDS):
        check(config(folder, "asked", full_data={"spot": spot}, retrieval=retrieval))
    last = {"sources": ("tiny_mood", "tiny_free"), "teacher": dataclasses.replace(spot, init="vocab")}
    retrieval = RetrievalConfig(use="mixture", stages={"mixture": spot})  # of one source, not known which
    with pytest.raises(UserError, match=WORDS):
        check(config(folder, "asked", **mood, **last, full_data={"spot": spot}, retrieval=retrieval))


@pytest.mark.parametrize("name", ["lester_lengths", "lester_inits"])
def test_a_dry_run_tells_of_answers_that_the_library_knows_to_be_free_text(name, capsys):
    """Without weights or data; of `lester_inits`, whose first cells start from something else, too."""
    arguments = ["sweep", f"--gin_file=gin/studies/{name}.gin", "--dry-run", "--gin.PromptConfig.init_labels_of={}"]
    assert cli.main(arguments) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Task 'record_prompt_tuning' has no class labels" in told and "its answers are free text" in told


def test_what_the_library_knows_to_be_free_text():
    """Neither digits nor words of labels nor STS-B's few numbers; a task that says nothing of itself may be anything."""
    data = tiny.experiment(Path("f"), "r").data
    known = {name: writes_free_text(dataclasses.replace(data, task_modules=("tasks", "tiny_tasks")), name) for name in FREE_TEXT}
    assert known == FREE_TEXT


def test_words_of_a_task_that_the_study_leaves_out_do_no_harm_and_no_words_are_told(folder):
    """A study may be cut down to some of its targets by a flag."""
    check(config(folder, "fewer", targets=("tiny_mood",), words={"tiny_free": ("red",)}))
    with pytest.raises(UserError, match=r"init_labels_of\['tiny_free'\] names no word"):
        plan(config(folder, "fewer", words={"tiny_free": ()}))
