"""What a prompt is near to, on embeddings made by hand, and the `inspect` command on prompts whose start is known."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from mpt_jax import setup
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import Experiment, StreamConfig
from mpt_jax.errors import UserError
from mpt_jax.prompts.files import save_prompts
from mpt_jax.studies import figures, interpret
from mpt_jax.studies.inspection import count_tokens, prompts_of, run_inspect

# Pieces along three axes, of different norms, and one that has none.
EMBEDDING = np.array([[2, 0, 0], [0, 3, 0], [0, 0, 1], [5, 5, 0], [0, 0, 0], [-1, 0, 0]], np.float32)
HALF = np.sqrt(0.5)


def random_prompts(n, length=4, seed=0):
    return list(np.random.default_rng(seed).normal(size=(n, length, 8)))


def test_nearest_pieces_are_by_direction_not_by_norm():
    prompt = np.array([[100, 0, 0], [0.01, 0.01, 0], [0, -1, 0]], np.float32)
    ids, cosines = interpret.nearest_pieces(prompt, EMBEDDING, 3)
    assert ids.tolist() == [[0, 3, 1], [3, 0, 1], [0, 2, 4]]  # of equally near ones the lower id
    np.testing.assert_allclose(cosines, [[1, HALF, 0], [1, HALF, HALF], [0, 0, 0]], atol=1e-6)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"1 to 6, the number of pieces, not {k}"):
            interpret.nearest_pieces(prompt, EMBEDDING, k)


def test_purity_is_the_mean_cosine_over_pairs_of_different_pieces():
    vectors = np.random.default_rng(1).normal(size=(2, 5, 8))
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected = [np.mean([one[i] @ one[j] for i, j in pairs]) for one in unit]
    np.testing.assert_allclose(interpret.mean_pair_cosine(vectors), expected)
    ids = np.array([[0, 3, 1], [0, 5, 2]])
    np.testing.assert_allclose(interpret.mean_pair_cosine(EMBEDDING[ids]), [2 * HALF / 3, -1 / 3], rtol=1e-6)
    with pytest.raises(ValueError, match="no pairs"):
        interpret.mean_pair_cosine(EMBEDDING[:1])


def test_purity_of_a_whole_embedding_is_what_random_pieces_have():
    embedding = np.random.default_rng(2).normal(size=(30, 4)) + 0.5
    drawn = np.random.default_rng(3)
    draws = [interpret.mean_pair_cosine(embedding[drawn.choice(30, 5, replace=False)]) for _ in range(3000)]
    np.testing.assert_allclose(interpret.mean_pair_cosine(embedding), np.mean(draws), atol=4 * np.std(draws) / np.sqrt(3000))


def test_neighbours_are_more_alike_than_random_pieces_even_of_a_random_direction():
    embedding = np.random.default_rng(4).normal(size=(500, 8)).astype(np.float32)
    assert abs(interpret.mean_pair_cosine(embedding)) < 0.01
    assert interpret.purity_of_random_directions(embedding, 5) > 0.3


def test_labels_that_are_near_now_then_and_still():
    now, then = np.array([[1, 2], [3, 4], [5, 6], [7, 1]]), np.array([[2, 1], [7, 9], [3, 6], [8, 9]])
    assert interpret.tokens_near(now, {1, 3}).tolist() == [True, True, False, True]
    assert interpret.tokens_near(now, ()).tolist() == [False] * 4  # a label without pieces
    assert count_tokens({1, 3}, now, then) == {"tokens": 3, "at_start": 2, "still": 1}
    assert count_tokens({1, 3}, now, None) == {"tokens": 3, "at_start": None, "still": None}


def test_drift():
    start = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    cosines, moved = interpret.drift(np.array([[3.0, 4.0], [0.0, 1.0], [-2.0, 0.0], [1.0, 1.0]]), start)
    np.testing.assert_allclose(cosines, [1, 0, -1, 0])
    np.testing.assert_allclose(moved, [0, np.sqrt(2), 2, np.nan])


def test_cosine_similarity():
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    expected = np.array([[1, 1, 0, -1, 0], [1, 1, 0, -1, 0], [0, 0, 1, 0, 0], [-1, -1, 0, 1, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(interpret.cosine_similarity(rows), expected)


def test_both_similarities_by_hand():
    """Average tokens (2, 2) and (0, 5); cosines of the pairs 0, 0, 1 and 1 (one of the second's tokens is twice there)."""
    first, second = np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([[0.0, 9.0], [0.0, 1.0]])
    np.testing.assert_allclose(interpret.average_token_similarity([first, second]), [[1, HALF], [HALF, 1]])
    np.testing.assert_allclose(interpret.per_token_similarity([first, second]), [[0.5, 0.5], [0.5, 1]])


@pytest.mark.parametrize("lengths", [(4, 4), (4, 7)])
def test_similarities_are_those_of_the_definitions(lengths):
    """SPoT, section 5, with a loop over all pairs of tokens; prompts of different lengths, too."""
    prompts = [random_prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for i, one in enumerate(prompts):
        for j, other in enumerate(prompts):
            pairs = np.mean([cosine(a, b) for a in one for b in other])
            np.testing.assert_allclose(interpret.per_token_similarity(prompts)[i, j], pairs)
            average = cosine(one.mean(axis=0), other.mean(axis=0))
            np.testing.assert_allclose(interpret.average_token_similarity(prompts)[i, j], average)


def test_what_similarities_do_not_depend_on():
    first, second, third = random_prompts(3)
    permuted, scaled = second[::-1], second * np.array([[1.0], [2.0], [3.0], [4.0]])
    average, per_token = interpret.average_token_similarity, interpret.per_token_similarity
    np.testing.assert_allclose(average([first, first.copy(), 3 * first]), 1)
    for measure in (average, per_token):
        np.testing.assert_allclose(measure([first, permuted, third]), measure([first, second, third]))
    np.testing.assert_allclose(per_token([first, scaled]), per_token([first, second]))
    assert not np.allclose(average([first, scaled]), average([first, second]))
    same = per_token([first, first])
    np.testing.assert_allclose(same, same[0, 0])
    assert same[0, 0] < 1


def test_a_large_heatmap_has_smaller_squares_without_numbers():
    for count, numbers in ((2, 8), (figures.NUMBERED + 1, 0)):
        figure = figures.similarity_heatmap({"a": np.eye(count), "b": np.eye(count)}, [f"p{n}" for n in range(count)])
        assert sum(len(axis.texts) for axis in figure.axes) == numbers
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"p{n}" for n in range(count)]


def test_a_panel_of_small_values_has_a_scale_of_its_own():
    for factors, bars in (((1.0, 1.0), [1.0]), ((1.0, 0.25), [1.0, 0.25])):
        figure = figures.similarity_heatmap({str(n): factor * np.eye(2) for n, factor in enumerate(factors)}, ["a", "b"])
        assert [axis.get_ylim()[1] for axis in figure.axes if axis.get_ylabel() == "cosine similarity"] == bars


def test_a_shared_plain_prompt_is_one_and_mpt_has_one_for_each_stream():
    meta = {"tasks": ["a", "b", "a"], "groups": [0, 0, 1], "seeds": [3, 4], "scores": [None, 50.0], "lengths": [4, 2]}
    composed = np.arange(3 * 4 * 2.0).reshape(3, 4, 2)
    plain = prompts_of(meta | {"method": "plain"}, composed)
    assert [(one.name, one.tasks, one.stream, one.seed) for one in plain] == [
        ("a + 1 more", ["a", "b"], 0, 3),
        ("a", ["a"], 2, 4),
    ]
    assert plain[1].tokens.tolist() == composed[2, 2:].tolist()
    two = prompts_of(meta | {"method": "plain", "tasks": ["a", "a", "a"], "lengths": [4, 4]}, composed)
    assert [one.name for one in two] == ["a #0", "a #2"]  # as PATH#NUMBER takes them
    mpt = prompts_of(meta | {"method": "mpt"}, composed)
    assert [one.name for one in mpt] == ["a, 4 tokens", "b", "a, 2 tokens"]
    assert [one.tokens.shape for one in mpt] == [(4, 2), (4, 2), (2, 2)]
    alike = prompts_of(meta | {"method": "mpt", "lengths": [4, 4]}, composed)
    assert [one.name for one in alike] == ["a #0", "b", "a #2"]


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("inspect"))


def untrained(config: Experiment, moved: float = 0.0) -> Path:
    """A run's folder with prompts as training would begin with them, times 1 + moved."""
    backbone = setup.open_backbone(config, setup.mesh_of(config))
    streams = setup.find_streams(config)
    params = setup.initial_trainable(config, streams, backbone, setup.open_vocabulary(config, backbone))
    run = RunFolder(config.train.model_dir)
    run.begin(config)
    meta = {"tasks": streams.tasks, "groups": streams.groups, "seeds": streams.seeds, "backbone": backbone.fingerprint}
    meta |= {"lengths": streams.lengths(config.prompt.length), "scores": [None] * len(streams.seeds)}
    first = "shared" if "shared" in params else "prompt"
    save_prompts(run.path / "prompts.safetensors", params | {first: params[first] * (1 + moved)}, meta)
    return run.path


LABELS = {"init": "labels", "init_labels": ("yes", "no")}


def test_an_untrained_prompt_has_not_drifted(folder, capsys):
    config = tiny.experiment(folder, "untrained", prompt=LABELS)
    path = untrained(config)
    result = run_inspect(config)
    (prompt,) = result["prompts"]
    assert [token["moved"] for token in prompt["tokens"]] == [0.0] * 4
    np.testing.assert_allclose([token["start_cosine"] for token in prompt["tokens"]], 1, rtol=1e-6)
    assert result["no_drift_because"] == "" and prompt["purity"] == prompt["purity_at_start"]
    assert prompt["any_label"]["tokens"] == prompt["any_label"]["still"] >= 2
    assert json.loads((path / "inspect.json").read_text()) == result
    assert not (path / "figures").exists()  # nothing to compare with
    vocabulary = setup.load_vocabulary(folder / "vocabulary.model")
    random = prompt["tokens"][2]["nearest"][0]  # an embedding of the vocabulary, so its own nearest
    assert random["cosine"] == pytest.approx(1) and random["piece"] == vocabulary.pieces([random["id"]])[0]
    assert all(one["id"] < vocabulary.vocab_size for token in prompt["tokens"] for one in token["nearest"])
    printed = capsys.readouterr().out
    assert "tiny_colour: 4 tokens, seed 0" in printed and "label 'yes'" in printed
    assert f"Everything: {path / 'inspect.json'}" in printed


@pytest.mark.parametrize("method", ["plain", "mpt"])
def test_a_bank_of_mixed_lengths_moved_by_a_quarter(folder, capsys, method):
    streams = tuple(StreamConfig(task, n, seed=n, length=(4, 2, 0)[n]) for n, task in enumerate(tiny.TASKS))
    config = tiny.experiment(folder, f"bank_{method}", streams=streams, method=method)
    path = untrained(config, 0.25)
    result = run_inspect(tiny.replace(config, inspect={"tokens": 3}))
    assert [prompt["length"] for prompt in result["prompts"]] == [4, 2, 4]
    for prompt in result["prompts"]:
        np.testing.assert_allclose([token["moved"] for token in prompt["tokens"]], 0.25, rtol=1e-5)
        assert prompt["start_cosine"] == pytest.approx(1)
    assert result["similarity"]["prompts"] == list(tiny.TASKS)
    np.testing.assert_allclose(np.diag(result["similarity"]["average_token"]), 1)
    assert (path / "figures" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count(f"1 more token in {path / 'inspect.json'} (InspectConfig.tokens=0 prints all)") == 2


def test_why_a_start_is_not_known_is_told(folder, capsys):
    config = tiny.experiment(folder, "other", prompt=LABELS)
    path = untrained(config)

    def reason(config):
        result = run_inspect(config)
        assert all(prompt["moved"] is None and prompt["any_label"]["still"] is None for prompt in result["prompts"])
        assert f"is not known: {result['no_drift_because']}."[:60] in " ".join(capsys.readouterr().out.split())
        return result["no_drift_because"]

    assert reason(tiny.replace(config, train={"seed": 7})) == "the run had train.seed=0, but now it is 7"
    assert "prompt.init_labels=['yes', 'no']" in reason(tiny.replace(config, prompt={"init_labels": ("yes", "the")}))
    elsewhere = {"init": "file", "init_file": str(path)}
    config = tiny.replace(config, train={"model_dir": str(folder / "nothing")}, prompt=elsewhere)
    assert "holds no run" in reason(config)
    (path / "config.json").unlink()
    assert "has no config.json" in reason(tiny.experiment(folder, "other", prompt=LABELS))


def test_mistakes(folder):
    config = tiny.experiment(folder, "mistakes")
    with pytest.raises(UserError, match=r"has no prompts.safetensors"):
        run_inspect(config)
    with pytest.raises(UserError, match=r"InspectConfig.neighbours must be 2 or more, .* not 1"):
        run_inspect(tiny.replace(config, inspect={"neighbours": 1}))
    with pytest.raises(UserError, match=r"method='none' trains no prompt to inspect"):
        run_inspect(tiny.replace(config, prompt={"method": "none"}))
    untrained(config)
    with pytest.raises(UserError, match=r"InspectConfig.neighbours is 999, but the vocabulary has \d+ pieces"):
        run_inspect(dataclasses.replace(config, inspect=dataclasses.replace(config.inspect, neighbours=999)))
