import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.errors import UserError
from mpt_jax.prompts.files import check_prompts, load_prompts, save_prompts

G, N, P, D, R = 2, 3, 4, 6, 2
META = {
    "tasks": ["mnli", "naïve task", "mnli"],
    "groups": [0, 1, 1],
    "seeds": [3, 8],
    "scores": [81.5, None],
    "backbone": "0123456789abcdef",
}
SHAPES = {"mpt": {"shared": (G, P, D), "task_u": (N, P, R), "task_v": (N, R, D)}, "plain": {"prompt": (G, P, D)}}


def random_params(method="plain"):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES[method].items()}


@pytest.mark.parametrize("method", SHAPES)
def test_round_trip_is_exact(method, tmp_path):
    path = save_prompts(tmp_path / "new" / "p.safetensors", random_params(method), META | {"steps": 7})
    params, meta = load_prompts(path)
    assert {name: (leaf.tobytes(), leaf.dtype) for name, leaf in params.items()} == {
        name: (leaf.tobytes(), np.dtype("float32")) for name, leaf in random_params(method).items()
    }
    assert meta == META | {"steps": 7, "method": method, "length": P, "d_model": D, "path": str(path)}
    assert os.listdir(path.parent) == ["p.safetensors"]  # no temporary file is left
    again = save_prompts(tmp_path / "again.safetensors", params, meta)
    assert load_file(again).keys() == params.keys() and load_prompts(again)[1] | {"path": ""} == meta | {"path": ""}


def test_a_runs_folder_is_its_prompt_file(tmp_path):
    save_prompts(tmp_path / "prompts.safetensors", random_params(), META)
    np.testing.assert_array_equal(load_prompts(tmp_path)[0]["prompt"], random_params()["prompt"])
    with pytest.raises(UserError, match="has its run finished"):
        load_prompts(tmp_path.parent)


@pytest.mark.parametrize("method", SHAPES)
def test_a_task_chooses_its_prompt_and_the_best_of_its_seeds(method, tmp_path):
    path, stored = tmp_path / "p.safetensors", random_params(method)
    save_prompts(path, stored, META)
    params, meta = load_prompts(f"{path}#naïve task")
    assert meta["tasks"] == ["naïve task"] and meta["groups"] == [0] and meta["seeds"] == [8] and meta["scores"] == [None]
    best, _ = load_prompts(f"{path}#mnli")  # group 0 scored, group 1 did not
    for name, leaf in stored.items():
        stream = name.startswith("task_")
        np.testing.assert_array_equal(params[name], leaf[1:2])
        np.testing.assert_array_equal(best[name], leaf[0:1])
        save_prompts(path, stored, META | {"scores": [81.5, 90.0]})
        np.testing.assert_array_equal(load_prompts(f"{path}#mnli")[0][name], leaf[2:3] if stream else leaf[1:2])
        save_prompts(path, stored, META)
    with pytest.raises(UserError, match="no prompt for 'mnl'.*Did you mean 'mnli'"):
        load_prompts(f"{path}#mnl")


def test_the_whole_bank_can_be_asked_for(tmp_path):
    path = save_prompts(tmp_path / "p.safetensors", random_params(), META)
    assert load_prompts(f"{path}#*")[1]["tasks"] == META["tasks"]


def test_a_foreign_file_with_one_matrix_is_a_bank_of_one(tmp_path):
    save_file({"prompt": np.ones((P, D), np.float16)}, tmp_path / "p.safetensors", metadata={"format": "pt"})
    params, meta = load_prompts(tmp_path / "p.safetensors")
    assert params["prompt"].shape == (1, P, D) and params["prompt"].dtype == np.float32
    assert (meta["method"], meta["tasks"], meta["groups"], meta["length"], meta["d_model"]) == ("plain", [""], [0], P, D)
    check_prompts(meta, d_model=D, backbone="anything")


def test_misfits_are_errors_with_both_values(tmp_path):
    _, meta = load_prompts(save_prompts(tmp_path / "p.safetensors", random_params(), META))
    check_prompts(meta, d_model=D, backbone=META["backbone"], length=P, max_length=P)
    with pytest.raises(UserError, match="width 6 .* d_model is 8"):
        check_prompts(meta, d_model=8)
    with pytest.raises(UserError, match="0123456789abcdef .* ffff"):
        check_prompts(meta, d_model=D, backbone="ffff")
    with pytest.raises(UserError, match="4 tokens but .*max_length is 3"):
        check_prompts(meta, d_model=D, max_length=3)
    with pytest.raises(UserError, match="4 tokens but PROMPT_LENGTH is 5"):
        check_prompts(meta, d_model=D, length=5)


def test_missing_truncated_and_foreign_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(UserError, match="no prompt file .*p.safetensors"):
        load_prompts(path)
    save_prompts(path, random_params(), META)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="p.safetensors is not a complete"):
            load_prompts(path)
    save_file({"weight": np.ones(3, np.float32)}, path)
    with pytest.raises(UserError, match="p.safetensors holds the tensors weight; a prompt is prompt or shared"):
        load_prompts(path)


@pytest.mark.parametrize(
    "changes", [{"tasks": ["a"]}, {"groups": [0, 2, 2]}, {"seeds": [1]}, {"scores": []}, {"method": "mpt"}, {"tasks": 5}]
)
def test_metadata_that_contradicts_the_tensors_is_an_error(changes, tmp_path):
    path = save_prompts(tmp_path / "p.safetensors", random_params(), META)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (META | changes).items()}
    save_file(random_params(), path, metadata=text)
    with pytest.raises(UserError, match="p.safetensors (contradicts|says)"):
        load_prompts(path)


def test_factors_that_do_not_fit_the_shared_prompt_are_an_error(tmp_path):
    params = random_params("mpt") | {"task_v": np.ones((N, R, D + 1), np.float32)}
    save_file(params, tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="contradicts itself"):
        load_prompts(tmp_path / "p.safetensors")


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        save_prompts(tmp_path / "file" / "p.safetensors", random_params(), META)
