import json
import logging
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.errors import UserError
from mpt_jax.prompts.arrays import t5x_file, write_array
from mpt_jax.prompts.files import check_prompts, load_prompts, save_prompts

G, N, P, D, R = 2, 3, 4, 6, 2
META = {
    "tasks": ["mnli", "naïve task", "mnli"],
    "groups": [0, 1, 1],
    "seeds": [3, 8],
    "scores": [81.5, None],
    "lengths": [P, P],
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


@pytest.mark.parametrize("method", SHAPES)
def test_a_number_chooses_that_prompt_and_a_task_tells_which_it_took(method, tmp_path, caplog):
    path, stored = tmp_path / "p.safetensors", random_params(method)
    lengths, scores = [P, P - 1], [81.5, 90.0]
    save_prompts(path, stored, META | {"lengths": lengths, "scores": scores})
    with caplog.at_level(logging.INFO, "mpt_jax"):
        for number, group in enumerate(META["groups"]):
            params, meta = load_prompts(f"{path}#{number}")
            assert meta["tasks"] == [META["tasks"][number]] and meta["lengths"] == [lengths[group]]
            for name, leaf in stored.items():
                tokens = leaf[number if name.startswith("task_") else group]
                np.testing.assert_array_equal(params[name][0], tokens if name == "task_v" else tokens[-lengths[group] :])
        assert not caplog.messages  # nothing was chosen for anyone
        load_prompts(f"{path}#mnli")
    taken = f"prompt 2 is taken ({P - 1} tokens, seed 8), the best by validation score, 90.00"
    assert caplog.messages == [f"{path} has 2 prompts for mnli; {taken}"]
    with pytest.raises(UserError, match="has no prompt 3; it has 3, numbered from 0"):
        load_prompts(f"{path}#3")
    save_prompts(path, stored, META | {"tasks": ["mnli", "1", "mnli"]})
    assert load_prompts(f"{path}#1")[1]["tasks"] == ["1"]  # a task's name comes first
    save_prompts(path, stored, META | {"tasks": ["mnli", "mnli", "2"]})
    assert load_prompts(f"{path}#2")[1]["tasks"] == ["2"]


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


PROMPT = random_params()["prompt"][0]


@pytest.mark.parametrize("array", [PROMPT, PROMPT[None], PROMPT.astype(float), PROMPT[None].astype(float), PROMPT.T.copy().T])
@pytest.mark.parametrize("name", ["prompt.npy", "prompt", "encoder.prompt.prompt.prompt"])
def test_a_numpy_array_is_a_bank_of_one(array, name, tmp_path):
    """Known by its content, whatever it is called."""
    with (tmp_path / name).open("wb") as file:
        np.save(file, array)
    params, meta = load_prompts(tmp_path / name)
    np.testing.assert_array_equal(params["prompt"], PROMPT[None])
    assert params["prompt"].dtype == np.float32
    assert (meta["method"], meta["tasks"], meta["groups"], meta["length"], meta["d_model"]) == ("plain", [""], [0], P, D)
    with pytest.raises(UserError, match="no prompt for 'mnli'; it has prompts without a task's name"):
        load_prompts(f"{tmp_path / name}#mnli")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, P, D)), r"shape \(2, 4, 6\); a prompt is \[P,D\] or \[1,P,D\]"),
        (np.ones(P), r"shape \(4,\)"),
        (np.ones((0, D)), r"shape \(1, 0, 6\)"),
        (np.ones((P, D), int), "dtype int64"),
        (np.full((P, D), "a"), "dtype <U1"),
        (np.full((P, D), 1e300), "24 numbers that are no finite float32"),
        (np.full((P, D), np.nan, np.float32), "24 numbers"),
        (np.full((P, D), None), "is not a complete NumPy array .*pickl"),
    ],
)
def test_an_array_that_is_no_prompt_is_an_error(array, words, tmp_path):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UserError, match=f"p.npy.*{words}"):
        load_prompts(tmp_path / "p.npy")


def test_broken_arrays_and_pickles_are_errors(tmp_path):
    path = tmp_path / "p.npy"
    np.save(path, PROMPT)
    whole = path.read_bytes()
    for kept in (0, 4, 6, 10, 60, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="p.npy is not a complete NumPy array"):
            load_prompts(path)
    for damage in (b"(", b"{", b"'", b"\xff"):
        path.write_bytes(whole.replace(b")", damage))
        with pytest.raises(UserError, match="p.npy is not a complete NumPy array"):
            load_prompts(path)
    for name in ("p.npy", "p.pt"):  # what it would run must not run
        (tmp_path / name).write_bytes(pickle.dumps(_Trap()))
        with pytest.raises(UserError, match=f"{name} is not a complete .*pickl"):
            load_prompts(tmp_path / name)


class _Trap:
    def __reduce__(self):
        return pytest.fail, ("the pickle was loaded",)


def test_a_folder_of_prompt_tuning_is_its_one_saved_step(tmp_path):
    write_array(t5x_file(tmp_path, 7), PROMPT)
    for left_over in ("checkpoint_8.tmp-12", "checkpoint_7.backup-3.5"):
        write_array(tmp_path / "numpy_checkpoints" / left_over / "encoder.prompt.prompt.prompt", PROMPT)
    for path in (tmp_path, t5x_file(tmp_path, 7).parent):
        np.testing.assert_array_equal(load_prompts(path)[0]["prompt"], PROMPT[None])
    write_array(t5x_file(tmp_path, 10), PROMPT)
    with pytest.raises(UserError, match="prompts of the steps 7, 10; give the folder of one"):
        load_prompts(tmp_path)


def adapter(folder, kind="PROMPT_TUNING", submodules=1, tasks=3, **changes):
    """A PEFT adapter as PEFT writes it; `changes` are of its configuration. Returns the tensors."""
    rng, rows = np.random.default_rng(1), submodules * P
    tensors = {"prompt_embeddings": rng.normal(size=(rows, D)).astype(np.float32)}
    config = {"peft_type": kind, "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P, "num_transformer_submodules": submodules}
    if kind == "MULTITASK_PROMPT_TUNING":
        tensors["prefix_task_cols"] = rng.normal(size=(tasks, rows, R)).astype(np.float32)
        tensors["prefix_task_rows"] = rng.normal(size=(tasks, R, D)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return tensors


@pytest.mark.parametrize("submodules", [1, 2])
def test_a_peft_adapter_is_read_and_its_second_submodule_is_left_out_aloud(submodules, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    plain = adapter(tmp_path / "plain", submodules=submodules)
    for path in (tmp_path / "plain", tmp_path / "plain" / "adapter_model.safetensors"):
        params, meta = load_prompts(path)
        np.testing.assert_array_equal(params["prompt"], plain["prompt_embeddings"][None, :P])
    assert (meta["tasks"], meta["backbone"]) == ([""], "")
    mpt = adapter(tmp_path / "mpt", "MULTITASK_PROMPT_TUNING", submodules)
    params, meta = load_prompts(tmp_path / "mpt")
    np.testing.assert_array_equal(params["shared"], mpt["prompt_embeddings"][None, :P])
    np.testing.assert_array_equal(params["task_u"], mpt["prefix_task_cols"][:, :P])
    np.testing.assert_array_equal(params["task_v"], mpt["prefix_task_rows"])
    assert (meta["tasks"], meta["groups"]) == (["0", "1", "2"], [0, 0, 0])
    np.testing.assert_array_equal(load_prompts(f"{tmp_path / 'mpt'}#1")[0]["task_v"], mpt["prefix_task_rows"][1:2])
    said = [record.getMessage() for record in caplog.records if "two submodules" in record.getMessage()]
    assert all(f"first {P} of its {2 * P} rows" in line for line in said)
    assert len(said) == (4 if submodules == 2 else 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LORA"}, "peft_type='LORA'; only PROMPT_TUNING and"),
        ({"peft_type": ["LORA"]}, "peft_type=\\['LORA'\\]"),
        ({"peft_type": "PROMPT_TUNNING"}, "Did you mean 'PROMPT_TUNING'"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "holds the tensors prompt_embeddings, but MULTITASK_PROMPT_TUNING has"),
        ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM'"),
        ({"num_virtual_tokens": 3}, r"num_virtual_tokens=3 .*\(4, 6\)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
    ],
)
def test_an_adapter_that_is_no_prompt_or_contradicts_itself_is_an_error(changes, words, tmp_path):
    adapter(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load_prompts(tmp_path)


def test_a_broken_adapter_is_an_error(tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is not the configuration"):
        load_prompts(tmp_path)
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no prompt file .*adapter_model.safetensors; .*safe_serialization"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("shape", ["(99999999999999999999, 3)", "(True, 4)"])
def test_a_damaged_array_header_is_one_sentence(shape, tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    (tmp_path / "p.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match=r"p\.npy is not a complete NumPy array"):
        load_prompts(tmp_path / "p.npy")
