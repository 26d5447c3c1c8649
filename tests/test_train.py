"""Whole runs on a tiny T5: what moves and what does not, what is compiled, what is written, what goes wrong."""

import dataclasses
import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import setup, train, train_state
from mpt_jax.checkpoint.backbone import fingerprint, load_backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import StreamConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import run_evaluate
from mpt_jax.infer import run_infer
from mpt_jax.predict import rank_labels
from mpt_jax.prompts.files import load_prompts
from mpt_jax.train import run_training

FULL = {"method": "none", "optimizer": {"rules": ((".*", 0.01),), "factored": True, "scale_by_parameter": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("train"))


def opened(config):
    return setup.open_backbone(config, setup.mesh_of(config))


@pytest.mark.parametrize("method", ["plain", "mpt"])
def test_only_the_prompt_moves(folder, method):
    config = tiny.experiment(folder, f"moves_{method}", method=method, tasks=tiny.TASKS[:2], steps=3)
    backbone = opened(config)
    before = jax.tree.map(lambda leaf: np.array(leaf), backbone.params)
    streams = setup.find_streams(config)
    start = setup.initial_trainable(config, streams, backbone, setup.open_vocabulary(config, backbone))
    result = run_training(config, backbone)
    jax.tree.map(np.testing.assert_array_equal, backbone.params, before)
    assert backbone.fingerprint == fingerprint(backbone.params) == fingerprint(load_backbone(config.backbone).params)
    assert result.params.keys() == start.keys()
    for name, leaf in start.items():
        assert not np.array_equal(leaf, result.params[name]), name


def test_the_gradient_is_of_the_prompt_alone(folder):
    """The step's program has no array of a backbone's shape among its outputs, and the state holds none."""
    config = tiny.experiment(folder, "gradient", steps=1)
    backbone, mesh = opened(config), setup.mesh_of(config)
    groups = (0,)
    module = train.build_prompt(config.prompt, groups, tiny.CONFIG.d_model)
    start = {"prompt": np.zeros((1, 4, tiny.CONFIG.d_model), np.float32)}
    state = train_state.create_state(start, backbone.model, config.optimizer, 1, groups, 0, mesh)
    step = train_state.make_train_step(backbone.model, module, config.loss, config.optimizer, 1, groups, mesh)
    batch = {
        "encoder_tokens": np.ones((2, 8), np.int32),
        "decoder_input_tokens": np.zeros((2, 3), np.int32),
        "decoder_target_tokens": np.ones((2, 3), np.int32),
        "loss_weights": np.ones((2, 3), np.float32),
        "task_ids": np.zeros(2, np.int32),
    }
    outputs = jax.eval_shape(step, state, {"backbone": backbone.params}, batch)
    held = sum(leaf.size for leaf in jax.tree.leaves(outputs))
    assert held < 4 * start["prompt"].size + 100


@pytest.fixture(scope="module")
def pretrained(folder):
    """Two tasks learnt from random weights. Returns the run's configuration and result."""
    config = tiny.experiment(
        folder,
        "pretrained",
        tasks=tiny.TASKS[:2],
        steps=150,
        checkpoint="scratch",
        train={"eval_period": 150, "log_period": 50},
        **FULL,
    )
    return config, run_training(config)


def test_pretraining_from_scratch_learns(folder, pretrained):
    config, result = pretrained
    losses = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert losses[0] > 10 * losses[-1]
    assert result.scores[0] == 100.0
    other = tiny.replace(config, train={"seed": 1})
    assert opened(other).fingerprint != opened(config).fingerprint


def test_model_tuning_moves_everything_and_writes_a_model(folder, pretrained):
    config, _ = pretrained
    config = tiny.replace(config, train={"model_dir": str(folder / "tuned"), "steps": 3, "eval_period": 0})
    backbone = opened(config)
    before = jax.tree.map(lambda leaf: np.array(leaf), backbone.params)
    result = run_training(config, backbone)
    jax.tree.map(np.testing.assert_array_equal, backbone.params, before)  # the given backbone was copied, not donated
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(result.params["backbone"]), strict=True
    ):
        assert not np.array_equal(old, new), jax.tree_util.keystr(path)
    # The run's folder serves as INITIAL_CHECKPOINT_PATH, of a prompt's run, too.
    on_tuned = tiny.experiment(folder, "prompt_on_tuned", steps=1, checkpoint=str(folder / "tuned"))
    jax.tree.map(np.testing.assert_array_equal, load_backbone(on_tuned.backbone).params, result.params["backbone"])
    run_training(on_tuned)
    again = run_training(config)  # finished: read back
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_model_tuning_holds_its_weights_once(folder):
    """The state's; not the loaded ones, too, of which it is a copy."""

    def kernels():
        gc.collect()
        return {id(leaf) for leaf in jax.live_arrays() if leaf.shape == shape}

    config = tiny.experiment(folder, "once", method="none")
    shape = opened(config).params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"].shape
    before = kernels()
    run = train._Run(config, RunFolder(config.train.model_dir), None, "")
    held = kernels() - before
    run.close()
    assert held and held <= {id(leaf) for leaf in jax.tree.leaves(run.state)}


def test_second_run_and_second_step_compile_nothing(folder):
    """Runs that differ in seeds, tasks, folder, teachers' path and (constant rate) length share one program."""
    own = {"weight_decay": 0.00012}  # a program that no other test shares and compiles for shapes of its own
    first = tiny.replace(tiny.experiment(folder, "compile_a", steps=3), optimizer=own)
    backbone = opened(first)
    run_training(first, backbone)
    step = train_state.make_train_step(
        backbone.model,
        train.build_prompt(first.prompt, (0,), tiny.CONFIG.d_model),
        first.loss,
        first.optimizer,
        3,
        (0,),
        setup.mesh_of(first),
    )
    assert step._cache_size() == 1
    second = tiny.experiment(folder, "compile_b", steps=5, streams=(StreamConfig("tiny_animal", 0, 4, 7),))
    run_training(tiny.replace(second, train={"seed": 3}, optimizer=own), backbone)
    assert step._cache_size() == 1


def test_best_of_each_group_is_kept(folder, pretrained):
    """A learning rate that ruins a good prompt: the file holds what was best, and a group's best is its own."""
    config = tiny.experiment(
        folder,
        "best",
        tasks=tiny.TASKS[:2],
        steps=12,
        checkpoint=str(folder / "pretrained"),
        train={"eval_period": 3, "checkpoint_period": 6},
        optimizer={"rules": ((".*", 30.0),)},
    )
    result = run_training(config)
    validations = [record for record in result.history if record["kind"] == "validation"]
    scores = np.asarray([record["scores"] for record in validations])
    np.testing.assert_allclose(result.scores, scores.max(axis=0))
    params, meta = load_prompts(folder / "best")
    assert meta["scores"] == scores.max(axis=0).tolist()
    assert meta["tasks"] == list(tiny.TASKS[:2]) and meta["groups"] == [0, 1] and meta["method"] == "plain"
    # Each group's row is the prompt of its own best step, found again by a run that stops there.
    for group in range(2):
        best_step = 3 * (1 + int(scores[:, group].argmax()))
        stopped = tiny.replace(config, train={"steps": best_step, "model_dir": str(folder / f"best_{group}"), "eval_period": 0})
        np.testing.assert_array_equal(run_training(stopped).params["prompt"][group], params["prompt"][group])


def test_the_best_may_be_chosen_by_ranking(folder):
    """Validation ranks the labels of each task, as `evaluate` does afterwards: the share of targets that rank first."""
    config = tiny.experiment(folder, "ranked", tasks=tiny.TASKS[:2], steps=1, train={"eval_period": 1})
    config = tiny.replace(config, decode={"method": "rank"})
    result = run_training(config)
    assert result.scores.tolist() == [row["score"] for row in run_evaluate(config)["tasks"]]
    trained = setup.open_trained(config, setup.mesh_of(config))
    vocabulary = setup.open_vocabulary(config, trained.backbone)
    labels = setup.open_labels(config, tiny.TASKS[:2], vocabulary)
    caches = setup.open_caches(config, tiny.TASKS[:2], "validation", vocabulary)
    for n, (cache, label_set) in enumerate(zip(caches, labels, strict=True)):
        rows, source = range(len(cache)), (trained.backbone, trained.prompt_module, trained.trainable)
        inputs, same = [cache.inputs(i) for i in rows], [label_set] * len(cache)
        scores = rank_labels(*source, inputs, [n] * len(cache), same, lengths=tiny.LENGTHS, decode=config.decode)
        first = [label_set.texts[int(np.argmax(row))] for row in scores]
        hits = sum(answer == cache.target_text(i) for i, answer in zip(rows, first, strict=True))
        assert result.scores[n] == pytest.approx(100 * hits / len(cache))


def test_history_is_what_was_written(folder):
    config = tiny.experiment(folder, "history", steps=8, train={"eval_period": 4, "tensorboard": True})
    result = run_training(config)
    lines = [json.loads(line) for line in (folder / "history" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 4), ("validation", 4), ("train", 8), ("validation", 8)]
    assert lines[0]["loss"] > 0 and lines[0]["examples_per_second"] > 0
    assert list((folder / "history" / "tensorboard").glob("events*"))
    assert json.loads((folder / "history" / "config.json").read_text())["train"]["steps"] == 8


def test_logged_loss_is_per_token_whatever_the_normalization(folder):
    """One step, one batch: "sum" and "mean" tell the same number (of one group)."""
    losses = []
    for normalization in ("sum", "mean"):
        config = tiny.experiment(folder, f"log_{normalization}", steps=1, loss={"normalization": normalization})
        losses.append(run_training(config).history[0]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_finished_run_returns_what_it_left(folder):
    config = tiny.experiment(folder, "finished", steps=3, train={"eval_period": 3})
    first = run_training(config)
    again = run_training(config)
    np.testing.assert_array_equal(first.params["prompt"], again.params["prompt"])
    np.testing.assert_array_equal(first.scores, again.scores)
    assert first.history == again.history and first.path == again.path


def test_nan_stops_and_keeps_the_last_good_checkpoint(folder):
    """One of two tasks explodes: the message names its step and it alone; the checkpoint from before is still there and good."""
    base = {"tasks": tiny.TASKS[:2], "steps": 40, "train": {"checkpoint_period": 2, "log_period": 10}}
    config = tiny.experiment(folder, "nan", optimizer={"rules": ((".*", float("inf")),)}, **base)
    config = tiny.replace(config, train={"checkpoint_period": 1})  # the loss of step 1 is good, what it leads to is not
    with pytest.raises(UserError, match=r"not finite at step 1 \(tiny_colour, tiny_mood\); no checkpoint"):
        run_training(config)
    # The good run's checkpoint of step 4 survives a batch of step 5 that is poisoned.
    config = tiny.experiment(folder, "nan2", **base)
    backbone = opened(config)
    run_training(tiny.replace(config, train={"steps": 4}), backbone)
    good = load_prompts(folder / "nan2")[0]["prompt"]
    (folder / "nan2" / "finished.json").unlink()  # as if killed after the checkpoint of step 4
    broken = dict(backbone.params)
    broken["token_embedder"] = {
        "embedding": broken["token_embedder"]["embedding"].at[tokens_of(config, backbone, "dog")].set(np.nan)
    }
    with pytest.raises(
        UserError, match=r"at step \d+ \(tiny_colour\), .* [\d, ]+ of tiny_colour; the last good checkpoint, of step 4, is kept"
    ):
        run_training(tiny.replace(config, train={"log_period": 1000}), backbone._replace(params=broken))
    resumed = run_training(tiny.replace(config, train={"steps": 4}), backbone)
    np.testing.assert_array_equal(resumed.params["prompt"], good)


def tokens_of(config, backbone, word):
    return np.asarray(setup.open_vocabulary(config, backbone).encode(word))[-1:]


class SignalAtFirstLine(io.StringIO):
    """A terminal's other end that sends SIGTERM when it reads of step 10."""

    def write(self, text):
        if text.startswith("step 10/"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_first_signal_saves_and_stops(folder, monkeypatch):
    """SIGTERM in mid-run: a checkpoint, then KeyboardInterrupt; the same call goes on to the same prompt."""
    config = tiny.experiment(folder, "signal", steps=30, train={"checkpoint_period": 1000, "log_period": 10})
    straight = run_training(tiny.replace(config, train={"model_dir": str(folder / "no_signal")}))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SignalAtFirstLine())
        with pytest.raises(KeyboardInterrupt):
            run_training(config)
    assert [path.name for path in (folder / "signal" / "checkpoints").iterdir()] == ["10"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    np.testing.assert_array_equal(run_training(config).params["prompt"], straight.params["prompt"])


def test_a_built_cache_trains_without_tensorflow(folder):
    run_training(tiny.experiment(folder, "builds_cache", steps=1, train={"eval_period": 1}))
    script = (
        "import sys, pathlib, tiny\n"
        "from mpt_jax.train import run_training\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "run_training(tiny.experiment(folder, 'without_tf', steps=1, train={'eval_period': 1}))\n"
        "assert not {'tensorflow', 'seqio'} & set(sys.modules)\n"
    )
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unwritable(folder):
    (folder / "a_file").write_text("")
    return tiny.experiment(folder, "a_file/run")


MISTAKES = {
    "unwritable": (unwritable, r"Cannot write into MODEL_DIR '.*a_file/run' \(Not a directory\)"),
    "task": (
        lambda folder: tiny.replace(tiny.experiment(folder, "m1"), data={"mixture": "tiny_color", "streams": ()}),
        r"'tiny_color'.*Did you mean 'tiny_colour'\?",
    ),
    "validation": (
        lambda folder: tiny.experiment(folder, "m2", tasks=("tiny_word",), train={"eval_period": 2}),
        r"'tiny_word' has no split 'validation'",
    ),
    "metric": (
        lambda folder: tiny.experiment(folder, "m9", tasks=("tiny_no_metric",), train={"eval_period": 2}),
        r"'tiny_no_metric' has no metric to validate by; set TrainConfig\.eval_period=0",
    ),
    "labels": (
        lambda folder: tiny.replace(
            tiny.experiment(folder, "m10", tasks=("tiny_free",), train={"eval_period": 2}), decode={"method": "rank"}
        ),
        r"'tiny_free' has no label set to rank: its 18 targets of the split 'train' are not few ones that recur",
    ),
    "groups": (
        lambda folder: tiny.experiment(folder, "m3", streams=(StreamConfig("tiny_mood", 0), StreamConfig("tiny_colour", 2))),
        r"groups \[0, 2\]; number them 0 to 1",
    ),
    "vocabulary": (
        lambda folder: tiny.experiment(
            folder,
            "m4",
            checkpoint="scratch",
            architecture=tiny.dataclasses.replace(tiny.CONFIG, vocab_size=120),
        ),
        r"vocab_size=120, fewer than the \d+ ids",
    ),
    "length": (lambda folder: tiny.experiment(folder, "m5", prompt={"length": 2000}), r"max_length=1000, not 2000"),
    "rule": (
        lambda folder: tiny.experiment(folder, "m6", method="mpt", optimizer={"rules": (("task_.*", 0.1),)}),
        r"'shared' matches no rule",
    ),
    "teachers": (
        lambda folder: tiny.experiment(folder, "m7", method="mpt", loss={"teachers": str(folder / "nowhere")}),
        r"no prompt file .*nowhere",
    ),
    "checkpoint": (
        lambda folder: tiny.experiment(folder, "m8", checkpoint=str(folder / "nothing")),
        r"'.*nothing'.*does not exist",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(folder, mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        run_training(make(folder))
    assert "\n" not in str(caught.value)


def test_another_run_in_the_folder_is_not_overwritten(folder):
    run_training(tiny.experiment(folder, "occupied", steps=2))
    with pytest.raises(UserError, match=r"holds a run with prompt\.length=4, but now it is 5"):
        run_training(tiny.experiment(folder, "occupied", steps=2, prompt={"length": 5}))
    other = opened(tiny.experiment(folder, "x", checkpoint="scratch"))._replace(fingerprint="0" * 16)
    with pytest.raises(UserError, match=r"but this run's backbone is 0000"):
        run_training(tiny.experiment(folder, "occupied", steps=2), other)


def test_teacher_of_another_task_or_backbone(folder):
    run_training(tiny.experiment(folder, "teachers", tasks=tiny.TASKS[:2], steps=1))
    config = tiny.experiment(folder, "pupil", tasks=tiny.TASKS[1:], method="mpt", loss={"teachers": str(folder / "teachers")})
    with pytest.raises(UserError, match=r"no prompt for task 'tiny_animal'; it has tiny_colour, tiny_mood"):
        run_training(config)
    with pytest.raises(UserError, match=r"trained on the backbone \w+ but this one is \w+"):
        run_training(tiny.replace(config, backbone={"checkpoint": "scratch"}, train={"model_dir": str(folder / "pupil2")}))


def kept(folder, run, **settings):
    """A run with a checkpoint at every second step."""
    settings = {"steps": 4} | settings
    train = {"checkpoint_period": 2} | settings.pop("train", {})
    return tiny.experiment(folder, run, train=train, **settings)


@pytest.mark.parametrize("finished", [True, False])
def test_fewer_steps_than_were_taken_are_refused(folder, finished):
    run = f"fewer_{finished}"
    run_training(kept(folder, run))
    if not finished:
        (folder / run / "finished.json").unlink()
    with pytest.raises(UserError, match=r"has taken 4 steps already, more than TRAIN_STEPS=3; give at least as many"):
        run_training(kept(folder, run, steps=3))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_stretching_a_linear_schedule_is_told(folder, capsys, schedule):
    run_training(kept(folder, schedule, optimizer={"schedule": schedule}))
    run_training(kept(folder, schedule, optimizer={"schedule": schedule}, steps=8))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("resuming at step 4"))
    told = "; TRAIN_STEPS was 4 and is 8 now, so the linear schedule takes the learning rate from 0% to 50% of its peak here"
    assert line == "resuming at step 4" + (told if schedule == "linear" else "")


def test_an_unfinished_run_is_neither_evaluated_nor_used(folder):
    config = kept(folder, "unfinished", steps=2)
    run_training(config)
    (folder / "unfinished" / "finished.json").unlink()
    (folder / "in.jsonl").write_text('{"inputs": "the cat is red"}')
    files = {"input_file": str(folder / "in.jsonl"), "output_file": str(folder / "out.jsonl")}
    for command in (run_evaluate, run_infer):
        with pytest.raises(UserError, match=r"MODEL_DIR .*unfinished has not finished; let `train` continue it"):
            command(tiny.replace(config, infer=files))


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"max_eval_examples": 3}},
        {"data": {"eval_split": "test"}},
        {"decode": {"num_beams": 2}},
        {"decode": {"method": "rank"}},
    ],
)
def test_what_the_best_is_chosen_by_stays(tmp_path, change):
    """A lucky score on three examples would never be beaten on all of them."""
    config = tiny.experiment(tmp_path, "run")
    folder = RunFolder(config.train.model_dir)
    folder.begin(config)
    (folder.path / "checkpoints" / "2").mkdir(parents=True)
    [(part, field)] = [(part, field) for part, fields in change.items() for field in fields]
    with pytest.raises(UserError, match=rf"holds a run with {part}\.{field}=.*; give the old value to continue that run"):
        folder.begin(tiny.replace(config, **change))
    free = {"train": {"eval_period": 5, "steps": 9}, "decode": {"batch_size": 3}, "data": {"cache_dir": "elsewhere"}}
    free["backbone"] = {"architecture": dataclasses.replace(config.backbone.architecture, remat="full")}
    folder.begin(tiny.replace(config, **free))


def test_validation_may_stop_and_begin_again(folder):
    """Without it there is no best, nor a copy of what is trained; with it again, a best of the steps from there on."""
    periods = {4: 2, 8: 0, 12: 2}
    results = [run_training(kept(folder, "off", steps=s, train={"eval_period": p})) for s, p in periods.items()]
    assert [np.isfinite(result.scores).all() for result in results] == [True, False, True]
    straight = run_training(kept(folder, "straight", steps=8))
    np.testing.assert_array_equal(results[1].params["prompt"], straight.params["prompt"])


def test_edited_training_data_are_refused(folder, tmp_path, monkeypatch):
    """By what is in the examples: a file with the same content is welcome."""
    monkeypatch.setenv("MPT_JAX_DATA", str(tmp_path))
    file = tmp_path / "cola" / "train.jsonl"
    file.parent.mkdir()
    rows = [{"sentence": f"the food is {word}", "label": label} for word, label in (("good", 1), ("bad", 0)) * 4]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text)
    data = {"task_modules": ("tasks",), "lengths": {"inputs": 64, "targets": 6}}  # the tiny vocabulary spells the words out
    config = tiny.replace(kept(folder, "edited", tasks=("cola_attempt",), steps=2), data=data)
    run_training(config)
    longer = tiny.replace(config, train={"steps": 4})
    file.write_text(text.replace("bad", "sour", 1))
    with pytest.raises(UserError, match=r"checkpoints/2 was trained on other examples of the task 'cola_attempt' than there are"):
        run_training(longer)
    file.write_text(text)
    run_training(tiny.replace(longer, data={"cache_dir": str(tmp_path / "cache")}))


def test_a_task_of_files_that_are_nowhere(folder, monkeypatch):
    monkeypatch.delenv("MPT_JAX_DATA", raising=False)
    config = tiny.experiment(folder, "nowhere", tasks=("files_mine",))
    with pytest.raises(UserError, match=r"'files_mine'.* environment variable MPT_JAX_DATA, .* is not set"):
        run_training(tiny.replace(config, data={"task_modules": ("tasks",)}))


def test_weights_to_train_are_not_those_that_were_rounded(folder):
    """A frozen backbone in bfloat16 does not become the start of a model that is tuned in float32."""
    half = dataclasses.replace(tiny.CONFIG, param_dtype="bfloat16")
    rounded = opened(tiny.experiment(folder, "x", architecture=half))
    config = tiny.experiment(folder, "x", method="none")
    backbone = setup.open_backbone(config, setup.mesh_of(config), rounded)
    jax.tree.map(np.testing.assert_array_equal, backbone.params, load_backbone(config.backbone).params)
    assert backbone.fingerprint == rounded.fingerprint


def test_what_is_cut_and_a_warm_up_without_end_are_told(folder, capsys):
    config = tiny.experiment(folder, "told", steps=2, optimizer={"warmup_steps": 2})
    config = tiny.replace(config, data={"lengths": {"inputs": 3, "targets": 6}})
    run_training(config)
    err = capsys.readouterr().err
    assert "OptimizerConfig.warmup_steps=2 is not below TRAIN_STEPS=2: the learning rate only rises, to 50% of its peak" in err
    assert "warning: 100% of the training examples have inputs longer than 3 tokens" in err
    run_training(tiny.experiment(folder, "not_told", steps=2, optimizer={"warmup_steps": 1}))
    assert "warning" not in capsys.readouterr().err


def test_all_splits_are_there_before_the_first_cache_is_built(folder):
    config = tiny.experiment(folder, "splits", tasks=("tiny_mood", "tiny_word"), train={"eval_period": 1})
    config = tiny.replace(config, data={"cache_dir": str(folder / "no_cache_yet")})
    with pytest.raises(UserError, match="'tiny_word' has no split 'validation'"):
        run_training(config)
    assert not (folder / "no_cache_yet" / "tiny_mood").exists()
