"""The `export` command: every form comes back exactly, starts a run, and PEFT computes with it what we do."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
from hf_reference import V1_0, V1_1, random_hf_model, save_hf_model

from mpt_jax import cli
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.config import EXPORT_FORMATS, PromptConfig
from mpt_jax.errors import UserError
from mpt_jax.export import _how_to_start, run_export
from mpt_jax.gin_bindings import parse
from mpt_jax.models import T5
from mpt_jax.prompted_t5 import forward
from mpt_jax.prompts import build_prompt, compose
from mpt_jax.prompts.files import load_prompts, save_prompts
from mpt_jax.prompts.init import initial_prompt

P, D, R = 4, tiny.CONFIG.d_model, 2
TASKS = ["mnli", "naïve/task", "sst2"]
SHARED = {"tasks": TASKS, "groups": [0, 0, 0], "seeds": [3], "scores": [81.5], "backbone": "f00d", "steps": 70}
SEPARATE = SHARED | {
    "groups": [0, 1, 2],
    "seeds": [3, 4, 5],
    "lengths": [P] * 3,
    "scores": [81.5, None, 70.0],
    "k_shots": [4, 4, 16],
}


def random_params(method, groups, width=D):
    rng = np.random.default_rng(0)
    g, n = max(groups) + 1, len(groups)
    shapes = {"plain": {"prompt": (g, P, width)}, "mpt": {"shared": (g, P, width), "task_u": (n, P, R), "task_v": (n, R, width)}}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes[method].items()}


def a_run(folder, method="mpt", meta=SHARED):
    """A run's folder with prompts; returns its parameters."""
    params = random_params(method, meta["groups"])
    save_prompts(folder / "run" / "prompts.safetensors", params, meta)
    return params


def export(folder, form, output="out", task="", **parts):
    config = tiny.replace(tiny.experiment(folder, "run"), export={"format": form, "output": str(folder / output), "task": task})
    return run_export(tiny.replace(config, **parts))


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (params[name].dtype, params[name].shape) == (np.dtype("float32"), leaf.shape)
        np.testing.assert_array_equal(params[name], leaf)


def start(path, method="plain", **fields):
    """The initial parameters of a new run of one stream from `path`."""
    cfg = PromptConfig(**{"method": method, "length": P, "init": "file", "init_file": str(path)} | fields)
    embedding = np.zeros((40, D), np.float32)
    rest = {"embed": embedding.__getitem__, "d_model": D, "tokenize": lambda text: [], "vocab_size": 40, "fingerprint": "f00d"}
    return initial_prompt(cfg, groups=(0,), seeds=(0,), key=jax.random.key(0), **rest)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_one_prompt_comes_back_exactly_and_starts_a_run(form, tmp_path):
    params = a_run(tmp_path)
    composed = np.asarray(compose("mpt", params, SHARED["groups"]))[2:]
    path = export(tmp_path, form, task="sst2")
    back, meta = load_prompts(path)
    if form in ("safetensors", "peft_mpt"):
        assert_same(back, {"shared": params["shared"], "task_u": params["task_u"][2:], "task_v": params["task_v"][2:]})
        assert_same(start(path, "mpt", rank=R), back)
    else:
        assert_same(back, {"prompt": composed})
    if form not in ("npy", "t5x"):  # an array has no room for them
        known = {"tasks": ["sst2"], "groups": [0], "seeds": [3], "scores": [81.5], "backbone": "f00d", "steps": 70}
        assert known.items() <= meta.items()
        with pytest.raises(UserError, match="no prompt for 'sst'.*Did you mean 'sst2'"):
            load_prompts(f"{path}#sst")
    assert_same(start(path), {"prompt": composed})


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_a_whole_bank_is_one_prompt_file_or_a_folder_of_parts(form, tmp_path):
    params = a_run(tmp_path, meta=SEPARATE)
    path = export(tmp_path, form)
    if form == "safetensors":
        back, meta = load_prompts(path)
        assert_same(back, params)
        assert meta == SEPARATE | {"method": "mpt", "length": P, "d_model": D, "path": str(path)}
        return
    suffix = ".npy" if form == "npy" else ""
    assert sorted(part.name for part in path.iterdir()) == [name + suffix for name in ("mnli", "naïve_task", "sst2")]
    for n, name in enumerate(("mnli", "naïve_task", "sst2")):
        back, meta = load_prompts(path / (name + suffix))
        if form == "peft_mpt":
            assert_same(back, {name: leaf[n : n + 1] for name, leaf in params.items()})
        else:
            assert_same(back, {"prompt": np.asarray(compose("mpt", params, SEPARATE["groups"]))[n : n + 1]})
        if form in ("peft", "peft_mpt"):
            assert (meta["tasks"], meta["scores"], meta["k_shots"]) == (
                TASKS[n : n + 1],
                SEPARATE["scores"][n : n + 1],
                SEPARATE["k_shots"][n : n + 1],
            )


def test_what_all_tasks_share_is_one_part(tmp_path):
    """A plain prompt of a mixture; and MPT's P* with every task's factors, for PEFT."""
    plain = a_run(tmp_path, "plain")
    assert_same(load_prompts(export(tmp_path, "npy", "shared.npy"))[0], plain)
    mpt = a_run(tmp_path)
    back, meta = load_prompts(export(tmp_path, "peft_mpt"))
    assert_same(back, mpt)
    assert meta["tasks"] == TASKS
    assert sorted(path.name for path in export(tmp_path, "peft", "parts").iterdir()) == ["mnli", "naïve_task", "sst2"]


def test_parts_of_one_task_are_numbered(tmp_path):
    a_run(tmp_path, "plain", SEPARATE | {"tasks": ["a/b", "a_b", ""]})
    assert sorted(path.name for path in export(tmp_path, "npy").iterdir()) == ["a_b-0.npy", "a_b-1.npy", "prompt-2.npy"]


def test_prompt_tuning_s_layout(tmp_path):
    """Google's code loads the file by its path with numpy.load; the step is the run's."""
    params = a_run(tmp_path, "plain")
    path = export(tmp_path, "t5x") / "numpy_checkpoints" / "checkpoint_70" / "encoder.prompt.prompt.prompt"
    with path.open("rb") as file:
        np.testing.assert_array_equal(np.load(file), params["prompt"][0])
    assert_same(load_prompts(path)[0], params)


def test_a_prompt_file_without_a_run_is_exported_too(tmp_path):
    params = a_run(tmp_path)
    prompt = {"init": "file", "init_file": f"{tmp_path}/run#mnli"}
    path = export(tmp_path, "peft", prompt=prompt, train={"model_dir": str(tmp_path / "none")})
    assert_same(load_prompts(path)[0], {"prompt": np.asarray(compose("mpt", params, SHARED["groups"]))[:1]})


# PEFT asks transformers by a name that transformers gives up.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@PEFT_WARNS
@pytest.mark.parametrize(
    ("form", "config"), [("peft", V1_1), ("peft_mpt", V1_1), ("peft", V1_0)], ids=["peft", "peft_mpt", "peft-v1.0"]
)
def test_peft_computes_our_logits(form, config, tmp_path):
    hf_model = random_hf_model(config)
    architecture, weights = import_hf(save_hf_model(hf_model, tmp_path / "model"))
    params = random_params("mpt", (0, 0, 0), config.d_model)
    save_prompts(tmp_path / "run" / "prompts.safetensors", params, SHARED)
    settings = {"checkpoint": str(tmp_path / "model"), "architecture": architecture}
    folder = export(tmp_path, form, task="" if form == "peft_mpt" else "sst2", backbone=settings)
    task_ids = np.array([2, 0, 1]) if form == "peft_mpt" else np.array([2, 2, 2])

    rng = np.random.default_rng(7)
    inputs, targets = rng.integers(2, config.vocab_size, (3, 19)), rng.integers(1, config.vocab_size, (3, 7))
    inputs[1, 9:] = 0
    module = build_prompt(PromptConfig(method="mpt", length=P, rank=R), (0, 0, 0), config.d_model)
    prompt = module.apply({"params": params}, task_ids, np.zeros((3, 19, config.d_model)), inputs > 0)
    batch = {"encoder_tokens": inputs, "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1]}
    ours = np.asarray(forward(T5(architecture), weights, batch, prompt).logits)

    adapted = peft.PeftModel.from_pretrained(hf_model, str(folder)).eval()
    assert adapted.active_peft_config.peft_type == {"peft": "PROMPT_TUNING"}.get(form, "MULTITASK_PROMPT_TUNING")
    chosen = {"task_ids": torch.tensor(task_ids)} if form == "peft_mpt" else {}
    with torch.no_grad():
        tokens, mask = torch.tensor(inputs), torch.tensor(inputs > 0).long()
        theirs = adapted(input_ids=tokens, attention_mask=mask, labels=torch.tensor(targets), **chosen).logits.numpy()
        bare = hf_model(input_ids=tokens, attention_mask=mask, labels=torch.tensor(targets)).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()
    assert np.abs(bare - theirs).max() > 0.1 * theirs.std(), "the prompt hardly counts: the test shows less than it should"


@PEFT_WARNS
@pytest.mark.parametrize("submodules", [None, 1])
@pytest.mark.parametrize("make", [peft.PromptTuningConfig, peft.MultitaskPromptTuningConfig])
def test_an_adapter_made_by_peft_is_the_prompt_that_peft_gives_the_encoder(make, submodules, tmp_path):
    """Also with PEFT's default of two submodules."""
    several = {"num_tasks": 3, "num_ranks": R} if make is peft.MultitaskPromptTuningConfig else {}
    config = make(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=submodules, **several)
    adapted = peft.get_peft_model(random_hf_model(V1_1), config)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_()
        chosen = {"task_ids": torch.tensor([2, 0])} if several else {}
        theirs = adapted.get_prompt(batch_size=2, **chosen)[:, :P].numpy()
    adapted.save_pretrained(tmp_path)
    params, meta = load_prompts(tmp_path)
    plain = np.asarray(compose(meta["method"], params, meta["groups"]))
    np.testing.assert_allclose(plain[[2, 0] if several else [0, 0]], theirs, rtol=1e-5, atol=1e-6)


def test_the_adapter_names_its_backbone_only_where_peft_can_load_it(tmp_path):
    a_run(tmp_path, "plain")
    theirs = tmp_path / "t5-xl"
    theirs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (theirs / name).touch()
    named_by = {str(theirs): str(theirs), "embedded:mini": None, "gs://bucket/checkpoint_1100000": None, str(tmp_path): None}
    for n, (checkpoint, named) in enumerate(named_by.items()):
        folder = export(tmp_path, "peft", f"out-{n}", backbone={"checkpoint": checkpoint})
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == named


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"form": "safetensor"}, "ExportConfig.format must be one of .*Did you mean 'safetensors'"),
        ({"task": "sst"}, "prompts.safetensors has no prompt for 'sst'; .*Did you mean 'sst2'"),
        ({"output": "run/prompts.safetensors"}, "'.*prompts.safetensors' is what is to be exported"),
        ({"output": "run"}, "run' is a folder"),
        ({"output": "empty"}, "empty' is a folder"),
        ({"output": "file"}, "file' is there already; give a new path, or delete it"),
        ({"form": "peft", "output": "file"}, "file' is there already"),
        ({"form": "peft", "output": "run"}, "run' is there already"),
        ({"form": "t5x", "output": "run"}, "run' is there already"),
        ({"form": "npy", "output": "/proc/out.npy", "task": "sst2"}, "/proc/out.npy cannot be written"),
        ({"prompt": {"method": "none"}}, "trains no prompt .*/run/model, a Hugging Face folder"),
        ({"train": {"model_dir": "nothing"}}, "nothing has no prompts.safetensors"),
        ({"backbone": {"architecture": V1_1}}, "width 16 but the backbone's d_model is 24"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path)
    Path("file").write_text("not a folder")
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        export(tmp_path, **{"form": "safetensors"} | changes)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bank_is_written_whole_or_not_at_all(tmp_path):
    """One of its files is there already: none is written."""
    a_run(tmp_path)
    taken = tmp_path / "out" / "sst2.npy"
    taken.mkdir(parents=True)
    with pytest.raises(UserError, match=r"out' is there already"):
        export(tmp_path, "npy", output=str(taken.parent))
    assert list(taken.parent.iterdir()) == [taken]


def test_a_plain_prompt_has_no_factors(tmp_path):
    a_run(tmp_path, "plain")
    with pytest.raises(UserError, match=r"'peft_mpt', but .*prompts.safetensors holds prompts of the method 'plain'; use 'peft'"):
        export(tmp_path, "peft_mpt")
    config = tiny.replace(tiny.experiment(tmp_path, "run"), export={"format": "npy"})
    with pytest.raises(UserError, match="ExportConfig.output is not set"):
        run_export(config)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("meta", [SHARED, SEPARATE], ids=["shared", "separate"])
def test_the_advice_starts_a_run(form, meta, tmp_path, capsys):
    """What is printed last are the flags of a run that finds its prompt."""
    a_run(tmp_path, meta=meta)
    export(tmp_path, form, output="my out")
    flags = shlex.split(capsys.readouterr().out.splitlines()[-1])[-3:]
    more = ["MIXTURE_OR_TASK_NAME=a", "TRAIN_STEPS=1", "MODEL_DIR=m", f"PromptConfig.rank={R}"]
    bindings = [*(flag.removeprefix("--gin.") for flag in flags[1:]), *more]
    prompt = parse(["gin/backbones/mini.gin", flags[0].removeprefix("--gin_file=")], bindings).experiment().prompt
    assert (prompt.init, prompt.method) == ("file", "mpt" if form in ("safetensors", "peft_mpt") else "plain")
    start(prompt.init_file, prompt.method, length=prompt.length, rank=R)


def test_the_command(tmp_path, capsys):
    mpt = random_params("mpt", (0, 0, 0), width=64)
    save_prompts(tmp_path / "run" / "prompts.safetensors", mpt, SHARED)
    flags = {"MIXTURE_OR_TASK_NAME": "a", "TRAIN_STEPS": 1, "MODEL_DIR": tmp_path / "run", "ExportConfig.format": "peft_mpt"}
    flags["ExportConfig.output"] = tmp_path / "adapter"
    arguments = ["export", "--gin_file=gin/backbones/mini.gin", *(f"--gin.{name}={value}" for name, value in flags.items())]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    written, start = capsys.readouterr().out.splitlines()
    assert written == f"0=mnli, 1=naïve/task, 2=sst2: {tmp_path}/adapter"
    assert start.endswith(
        f"--gin_file=gin/methods/mpt_target.gin --gin.PROMPT_LENGTH=4 --gin.INITIAL_PROMPT_PATH={tmp_path}/adapter"
    )
    assert_same(load_prompts(tmp_path / "adapter")[0], mpt)


@pytest.mark.parametrize("tasks, chosen", [(["a", "b"], "a"), (["a", "b", "a"], "0"), (["", ""], "0")])
def test_of_several_prompts_the_hint_chooses_one_that_can_be_read(tmp_path, tasks, chosen):
    meta = {"tasks": tasks, "groups": list(range(len(tasks)))}
    path = save_prompts(tmp_path / "p.safetensors", {"prompt": np.ones((len(tasks), 4, 8), np.float32)}, meta)
    *_, start = shlex.split(_how_to_start("safetensors", path, load_prompts(path)[1]))
    assert start == f"--gin.INITIAL_PROMPT_PATH={path}#{chosen}"
    assert load_prompts(start.partition("=")[2])[1]["tasks"] == tasks[:1]
