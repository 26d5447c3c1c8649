"""The token cache: equal to seqio's output, rebuilt when anything it depends on changes, whole or absent, free of TensorFlow."""

import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import make_vocabulary

from mpt_jax import metrics
from mpt_jax.config import DataConfig
from mpt_jax.data import writer
from mpt_jax.data.cache import FORMAT, TokenCache, function_spec, load_function, mixture_tasks, open_task
from mpt_jax.data.vocabulary import Vocabulary, check_vocabulary, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.progress import counted

ROOT = Path(__file__).parent.parent

TASKS = """
    import functools
    import time

    import seqio
    from mpt_jax import metrics
    from tasks import features

    COLOURS = ["red", "blue", "green"]
    EDIT = ""

    def rows(size):
        return [
            {
                "inputs": EDIT + "the cat is " + " and ".join(COLOURS[(i + j) % 3] for j in range(i % 9 + 1)),
                "targets": "no " * (i % 2) + COLOURS[i % 3],
                "number": i,
                "weight": i / 2,
                "words": COLOURS[: i % 3],
            }
            for i in range(size)
        ]

    def last_word(text, example=None, is_target=False):
        assert isinstance(example["inputs_pretokenized"], bytes)  # as seqio has it
        return text.split()[-1] + str(example["number"])

    def slowly(dataset):
        def wait(number):
            time.sleep(0.001)
            return number

        wait_for = lambda row: row | {"number": seqio.preprocessors.tf.numpy_function(wait, [row["number"]], "int64")}
        return dataset.map(wait_for)

    def add(name, **changes):
        seqio.TaskRegistry.add(
            f"{__name__}_{name}",
            **{
                "source": features.rows_source({"train": functools.partial(rows, 700), "test": functools.partial(rows, 3)}),
                "preprocessors": [*features.TOKENIZE],
                "output_features": features.output_features(),
                "postprocess_fn": metrics.strip,
                "metric_fns": [metrics.accuracy, functools.partial(metrics.f1, positive="red")],
                **changes,
            },
        )

    add("plain")
    add("cuts_eos", preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
    add("one_step", preprocessors=[seqio.preprocessors.tokenize_and_append_eos])
    add("own_metrics", postprocess_fn=last_word)
    add(
        "numbers",
        source=features.rows_source({"train": [{"inputs": "a", "targets": str(i % 5)} for i in range(50)]}),
        postprocess_fn=metrics.number,
        metric_fns=[metrics.pearson],
    )
    add("slow", source=features.rows_source({"train": functools.partial(rows, 3000)}), preprocessors=[slowly, *features.TOKENIZE])
    add("nothing", preprocessors=[lambda dataset: dataset.take(0), *features.TOKENIZE])
    seqio.MixtureRegistry.add(f"{__name__}_mixture", [(f"{__name__}_plain", 3.0), (f"{__name__}_cuts_eos", 1.5)])
    seqio.MixtureRegistry.add(f"{__name__}_outer", [(f"{__name__}_mixture", 1.0), (f"{__name__}_one_step", 1.0)])
"""


@dataclasses.dataclass
class Place:
    """A module that registers tasks, and the configuration to use it."""

    folder: Path
    module: str
    data: DataConfig

    def python(self, code: str, **kwargs) -> subprocess.Popen:
        """A process that has `data` and `vocabulary` and runs `code`."""
        start = f"""
            import os, signal, sys
            from mpt_jax.config import DataConfig
            from mpt_jax.data.cache import mixture_tasks, open_task
            from mpt_jax.data.vocabulary import Vocabulary, load_vocabulary
            data = DataConfig(**{dataclasses.asdict(self.data)!r})
            vocabulary = load_vocabulary({str(self.folder / "sentencepiece.model")!r})
        """
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "PYTHONDONTWRITEBYTECODE": "1"}
        script = textwrap.dedent(start) + textwrap.dedent(code)
        return subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, stderr=subprocess.PIPE, **kwargs)

    def run(self, code: str) -> None:
        process = self.python(code)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.fixture
def place(tmp_path, monkeypatch, vocabulary, request):
    module = "of_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(TASKS))
    (tmp_path / "sentencepiece.model").write_bytes(vocabulary.path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    data = DataConfig("", {"inputs": 12, "targets": 12}, 4, task_modules=(module,), cache_dir=str(tmp_path / "cache"))
    return Place(tmp_path, module, data)


def variants(place: Place) -> list[Path]:
    return sorted(path for path in (place.folder / "cache").glob("*/*/*") if not path.name.startswith(".") and path.is_dir())


def seqio_output(task: str, vocabulary: Vocabulary, lengths: dict) -> list[dict]:
    """What seqio itself yields with this vocabulary."""
    import seqio

    original = seqio.TaskRegistry.get(task)
    features = {
        name: seqio.Feature(vocabulary.seqio(), add_eos=feature.add_eos) for name, feature in original.output_features.items()
    }
    dataset = original.replace(output_features=features).get_dataset(lengths, "train", shuffle=False)
    return list(dataset.as_numpy_iterator())


def text(value):
    if isinstance(value, bytes):
        return value.decode()
    return [text(item) for item in value] if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", ["plain", "cuts_eos", "one_step"])
@pytest.mark.parametrize("length", [12, 90])
def test_cache_holds_what_seqio_yields(place, vocabulary, name, length):
    data = dataclasses.replace(place.data, lengths={"inputs": length, "targets": length // 4})
    cache = open_task(data, f"{place.module}_{name}", "train", vocabulary)
    expected = seqio_output(cache.task, vocabulary, data.lengths)
    assert len(cache) == len(expected) == 700
    for i, example in enumerate(expected):
        assert np.array_equal(cache.inputs(i), example.pop("inputs")) and cache.inputs(i).dtype == np.int32
        assert np.array_equal(cache.targets(i), example.pop("targets"))
        assert cache.text(i) == {name: text(value) for name, value in example.items()}
    longer = sum(len(vocabulary.encode(cache.text(i)["inputs_pretokenized"])) + 1 > length for i in range(700))
    assert cache.truncated["inputs"] == longer and (longer > 0) == (length == 12)


def test_truncation_is_told(place, vocabulary, caplog):
    cache = open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    assert f"{cache.truncated['inputs']} inputs longer than 12 tokens" in caplog.text


def test_indices_outside_are_errors(place, vocabulary):
    cache = open_task(place.data, f"{place.module}_plain", "test", vocabulary)
    for index in (3, -1):
        with pytest.raises(IndexError):
            cache.inputs(index)


def test_labels_are_the_targets_of_a_classification(place, vocabulary):
    cache = open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    assert cache.labels == [cache.target_text(i) for i in range(700)]
    assert sorted(set(cache.labels)) == ["blue", "green", "no blue", "no green", "no red", "red"]
    assert cache.label_set.texts == ("blue", "green", "no blue", "no green", "no red", "red")
    for text, tokens in zip(*cache.label_set, strict=True):
        assert {tuple(cache.targets(i).tolist()) for i in range(700) if cache.target_text(i) == text} == {tokens}
    few = open_task(place.data, f"{place.module}_plain", "test", vocabulary)  # three rows say nothing
    assert few.labels is None
    with pytest.raises(UserError, match=rf"'{place.module}_plain' has no label set to rank: its 3 targets of the split 'test'"):
        _ = few.label_set


def test_labels_of_equal_tokens_are_told(place, vocabulary):
    """Three of the labels begin with "no", and are cut to it and EOS."""
    data = dataclasses.replace(place.data, lengths={"inputs": 12, "targets": 2})
    cache = open_task(data, f"{place.module}_plain", "train", vocabulary)
    with pytest.raises(UserError, match=r"'no \w+' and 'no \w+', which cannot be told apart .* \(2\) in TASK_FEATURE_LENGTHS"):
        _ = cache.label_set


def test_scores_are_the_tasks_own(place, vocabulary):
    cache = open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    predictions = [" red " if i % 2 == 0 else cache.target_text(i) for i in range(700)]
    scores = cache.score(predictions)
    hits = sum(prediction.strip() == target for prediction, target in zip(predictions, cache.labels, strict=True))
    assert scores["accuracy"] == pytest.approx(100 * hits / 700)
    assert set(scores) == {"accuracy", "f1", "invalid"}
    assert cache.score(["red", "no blue"], [0, 1]) == {"accuracy": 100.0, "f1": 100.0, "invalid": 0.0}
    assert cache.score(["red", "no blue"], np.array([1, 0])) == {"accuracy": 0.0, "f1": 0.0, "invalid": 0.0}
    few = open_task(place.data, f"{place.module}_plain", "test", vocabulary)  # no classification
    assert few.score(["red"], [0]) == {"accuracy": 100.0, "f1": 100.0}
    own = open_task(place.data, f"{place.module}_own_metrics", "train", vocabulary)
    assert own.meta["scoring"] is None
    assert own.score(["so red", "blue"], [0, 4])["accuracy"] == 100.0
    with pytest.raises(ValueError, match="1 predictions for 700"):
        cache.score(["red"])


def test_answers_that_are_no_labels_are_counted(place, vocabulary):
    """After the task's own postprocessing: of four answers one is " red ", one a label of another row, two are none."""
    cache = open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    assert cache.score([" red ", "green", "", "blueblue"], [0, 1, 2, 3])["invalid"] == 50.0
    assert cache.score([" red ", "green", "", "blueblue"], [0, 1, 2, 3], labels=("green", ""))["invalid"] == 50.0
    own = open_task(place.data, f"{place.module}_own_metrics", "train", vocabulary)  # makes "red0" of any "... red" for row 0
    assert own.score(["so red", "nothing"], [0, 4])["invalid"] == 50.0
    numbers = open_task(place.data, f"{place.module}_numbers", "train", vocabulary)
    assert set(numbers.score(["1", "x"], [0, 1])) == {"pearson"}  # a scale has no labels


def test_scoring_functions_by_name():
    for function in (metrics.accuracy, functools.partial(metrics.f1, positive="yes")):
        assert load_function(json.loads(json.dumps(function_spec(function))))(["yes"], ["yes"]) == function(["yes"], ["yes"])
    for foreign in (
        len,
        lambda targets, predictions: {},
        functools.partial(metrics.f1, ["1"]),
        functools.partial(metrics.f1, positive=len),
    ):
        assert function_spec(foreign) is None


def test_a_change_of_what_is_asked_for_is_another_cache(place, vocabulary, tmp_path):
    task = f"{place.module}_plain"
    first = open_task(place.data, task, "train", vocabulary)
    longer = open_task(dataclasses.replace(place.data, lengths={"inputs": 20, "targets": 12}), task, "train", vocabulary)
    assert len(longer.inputs(8)) > len(first.inputs(8))
    other = tmp_path / "other.model"
    make_vocabulary(other)
    other.write_bytes(other.read_bytes() + b"\x12\x00")  # an empty trainer_spec: the same pieces, other bytes
    assert open_task(place.data, task, "train", load_vocabulary(other)).folder != first.folder
    assert open_task(place.data, task, "train", vocabulary).folder == first.folder
    assert len(variants(place)) == 3


def test_a_cut_or_unreadable_cache_is_rebuilt(place, vocabulary):
    task = f"{place.module}_plain"
    folder = open_task(place.data, task, "test", vocabulary).folder
    for name, content in (("inputs.npy", b"cut"), ("meta.json", b"{"), ("meta.json", b"")):
        (folder / name).write_bytes(content)
        cache = open_task(place.data, task, "test", vocabulary)
        assert [cache.text(i)["number"] for i in range(3)] == [0, 1, 2] and len(cache.inputs(2)) > 3
    (folder / "labels.npy").unlink(missing_ok=True)
    assert variants(place) == [folder]


def test_a_built_cache_needs_no_tensorflow(place, vocabulary):
    open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    mixture_tasks(place.data, f"{place.module}_mixture")
    place.run(f"""
        from mpt_jax.data.sampling import make_loader, stream_data
        assert mixture_tasks(data, "{place.module}_mixture") == [("{place.module}_plain", 3.0), ("{place.module}_cuts_eos", 1.5)]
        cache = open_task(data, "{place.module}_plain", "train", vocabulary)
        assert make_loader(data, [stream_data(cache, k_shot=2)]).batch(5)["encoder_tokens"].shape == (4, 12)
        assert cache.score(cache.labels)["accuracy"] == 100.0
        assert vocabulary.decode(cache.targets(0)) == "red"
        assert not {{"tensorflow", "seqio", "tasks", "{place.module}"}} & set(sys.modules)
    """)


def test_two_builders_after_an_edit_leave_one_good_cache(place, vocabulary):
    task = f"{place.module}_plain"
    before = open_task(place.data, task, "train", vocabulary)
    source = place.folder / f"{place.module}.py"
    source.write_text(source.read_text().replace('EDIT = ""', 'EDIT = "see "'))
    builders = [place.python(f'assert len(open_task(data, "{task}", "train", vocabulary)) == 700') for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in builders]
    assert [process.returncode for process in builders] == [0, 0], errors
    (folder,) = variants(place)  # the stale one is gone, too
    assert folder != before.folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    place.run(f"""
        cache = open_task(data, "{task}", "train", vocabulary)
        assert cache.text(0)["inputs_pretokenized"] == "see the cat is red" and "tensorflow" not in sys.modules
    """)
    assert before.text(0)["inputs_pretokenized"] == "the cat is red"  # who has the old one open keeps it


def test_another_format_is_another_cache(place, vocabulary, monkeypatch):
    task = f"{place.module}_plain"
    first = open_task(place.data, task, "test", vocabulary)
    monkeypatch.setattr("mpt_jax.data.cache.FORMAT", FORMAT + 1)
    assert open_task(place.data, task, "test", vocabulary).folder.parent != first.folder.parent


def test_builders_killed_at_any_moment_leave_no_broken_cache(place, vocabulary):
    """Two at once, one of them SIGKILLed after a while that grows: before, while and after it writes."""
    task = f"{place.module}_slow"
    folder = place.folder / "cache" / task
    code = f'assert len(open_task(data, "{task}", "train", vocabulary)) == 3000; print("whole", flush=True)'
    for written in (1, 200_000):  # bytes, when the kill comes
        victim, other = place.python(code), place.python(code, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        mine = f".build-*-{victim.pid}-*/text.jsonl"
        while not any(path.stat().st_size >= written for path in folder.glob(f"*/{mine}")) and time.monotonic() < deadline:
            time.sleep(0.005)
        victim.kill()
        _, errors = victim.communicate(timeout=60)
        assert victim.returncode == -signal.SIGKILL, errors
        assert list(folder.glob("*/.build-*")), "nothing was under way"
        output, errors = other.communicate(timeout=120)
        assert output == "whole\n", errors
        cache = open_task(place.data, task, "train", vocabulary)
        assert [cache.text(i)["number"] for i in (0, 1500, 2999)] == [0, 1500, 2999]
        assert [path.name for path in cache.folder.parent.iterdir()] == [cache.folder.name]
        shutil.rmtree(folder)


def test_arrays_are_written_as_numpy_writes_them(tmp_path):
    """Byte for byte, whatever pieces they come in: the digest by which a run knows its data must not depend on it."""
    for pieces in ([], [[1, 2, 3]], [[5] * 9, [], [7] * 123_456]):
        with writer._ArrayFile(tmp_path / "grown.npy", np.int32) as file:
            for piece in pieces:
                file.append(piece)
        np.save(tmp_path / "whole.npy", np.array([number for piece in pieces for number in piece], np.int32))
        assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_percentiles_are_of_the_lengths_before_the_cut(place, vocabulary):
    cache = open_task(place.data, f"{place.module}_plain", "train", vocabulary)
    lengths = [len(vocabulary.encode(cache.text(i)["inputs_pretokenized"])) + 1 for i in range(len(cache))]
    assert max(lengths) > 12
    expected = {str(q): int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99, 100)}
    assert cache.percentiles["inputs"] == expected


def test_a_build_killed_while_writing_leaves_nothing(place, vocabulary):
    task = f"{place.module}_plain"
    killed = place.python(f"""
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the writer of byte 20,001 of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        open_task(data, "{task}", "train", vocabulary)
    """)
    killed.communicate(timeout=120)
    assert killed.returncode < 0
    leavings = list((place.folder / "cache" / task).glob("*/*"))
    assert leavings and all(path.name.startswith(".build-") for path in leavings)
    assert len(open_task(place.data, task, "train", vocabulary)) == 700
    assert not list((place.folder / "cache" / task).glob("*/.build-*"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    batches = [[0] * 1000] * 3
    out = io.StringIO()
    assert list(counted(batches, len, "task/train", 3000, period=0, out=out)) == batches
    pattern = r"task/train: {} of 3,000 examples  [\d,]+ examples/s  ETA \d+:\d\d"
    for line, done in zip(out.getvalue().splitlines(), ("1,000", "2,000", "3,000"), strict=True):
        assert re.fullmatch(pattern.format(done), line)
    out = io.StringIO()
    assert list(counted(batches, len, "task/train", None, period=0, out=out)) == batches
    assert re.fullmatch(r"task/train: 1,000 examples  [\d,]+ examples/s", out.getvalue().splitlines()[0])
    out = io.StringIO()
    assert list(counted(batches, len, "task/train", 3000, out=out)) == batches and not out.getvalue()  # it took less than 10 s
    out = Terminal()
    slow = (time.sleep(0.6) or batch for batch in batches)
    assert list(counted(slow, len, "task/train", 3000, out=out)) == batches
    assert "task/train" in out.getvalue() and "2000/3000" in out.getvalue().replace(",", "")


def test_mixtures(place, vocabulary):
    plain, cuts, one = (f"{place.module}_{name}" for name in ("plain", "cuts_eos", "one_step"))
    assert mixture_tasks(place.data, f"{place.module}_mixture") == [(plain, 3.0), (cuts, 1.5)]
    assert mixture_tasks(place.data, plain) == [(plain, 1.0)]
    nested = dict(mixture_tasks(place.data, f"{place.module}_outer"))
    assert nested[one] == 1.0 and nested[plain] == pytest.approx(2 / 3) and nested[cuts] == pytest.approx(1 / 3)


def test_mistakes_are_told_in_a_sentence(place, vocabulary, tmp_path):
    module = importlib.import_module(place.module)
    with pytest.raises(UserError, match=f"'{place.module}_plian'.*Did you mean '{place.module}_plain'"):
        open_task(place.data, f"{place.module}_plian", "train", vocabulary)
    with pytest.raises(UserError, match=f"Did you mean '{place.module}_mixture'"):
        mixture_tasks(place.data, f"{place.module}_mixtrue")
    with pytest.raises(UserError, match=r"has no split 'validation' \(it has train, test\).*eval_split"):
        open_task(place.data, f"{place.module}_plain", "validation", vocabulary)
    with pytest.raises(UserError, match="has no examples in its split 'train'"):
        open_task(place.data, f"{place.module}_nothing", "train", vocabulary)
    (tmp_path / "a_file").write_text("")
    unwritable = dataclasses.replace(place.data, cache_dir=str(tmp_path / "a_file" / "cache"))
    with pytest.raises(UserError, match=r"Cannot write the token cache .*DataConfig\.cache_dir"):
        open_task(unwritable, f"{place.module}_plain", "train", vocabulary)
    with pytest.raises(UserError, match="task_modules names 'no_such_module'"):
        open_task(dataclasses.replace(place.data, task_modules=("no_such_module",)), "x", "train", vocabulary)
    assert module.COLOURS


def test_vocabulary_equals_seqios(vocabulary):
    reference = vocabulary.seqio()
    texts = ["the cat is red", "naïve ☃ 7", "", "good <extra_id_0> and <extra_id_99> bad", "  two   spaces "]
    assert [vocabulary.encode(line) for line in texts] == [reference.encode(line) for line in texts]
    assert vocabulary.vocab_size == reference.vocab_size
    assert [vocabulary.encode(f"<extra_id_{k}>")[-1] for k in (0, 99)] == [vocabulary.vocab_size - 1, vocabulary.vocab_size - 100]
    for ids in ([5, 9, 12], [5, 1, 9], [5, 10**5, 9], [], [vocabulary.vocab_size - 4, 4]):
        assert vocabulary.decode(np.array(ids, np.int32)) == reference.decode(ids)


def test_vocabulary_mistakes(vocabulary, tmp_path):
    from tiny import CONFIG

    check_vocabulary(vocabulary, CONFIG)
    with pytest.raises(UserError, match=f"vocab_size=8, fewer than the {vocabulary.vocab_size} ids"):
        check_vocabulary(vocabulary, dataclasses.replace(CONFIG, vocab_size=8))
    check_vocabulary(vocabulary, dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size + 127))
    with pytest.raises(UserError, match=f"128 more than the {vocabulary.vocab_size} ids .* set BackboneConfig.vocabulary"):
        check_vocabulary(vocabulary, dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size + 128))
    with pytest.raises(UserError, match="Cannot read the vocabulary"):
        load_vocabulary(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_vocabulary(tmp_path / "text.model")


def test_repr_and_counts(place, vocabulary):
    cache = open_task(place.data, f"{place.module}_plain", "test", vocabulary)
    assert isinstance(cache, TokenCache) and repr(cache) == f"TokenCache({place.module}_plain/test, 3 examples)"
    assert cache.token_counts("inputs").tolist() == [len(cache.inputs(i)) for i in range(3)]
