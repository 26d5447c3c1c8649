"""Which source prompts suit a target task, and what is made of them: the start of SPoT (Vu et al. 2022, §3 and §5).

The sources are ranked for each run on a target: by the loss of their prompts on the run's training examples, before any training
there, or by a similarity to the run's embedding, a prompt trained on these examples for a while. Nothing but those examples is
looked at, so that a few-shot target stays one. Then `RetrievalConfig.use` says what the first `top` of them become.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.config import Experiment, RetrievalConfig, to_dict
from mpt_jax.data import fingerprint
from mpt_jax.data.cache import TokenCache
from mpt_jax.data.layout import Examples, assemble
from mpt_jax.data.sampling import k_shot_rows
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.evaluate import examined
from mpt_jax.losses import cross_entropy
from mpt_jax.models.t5 import T5
from mpt_jax.monitor import BadStepError
from mpt_jax.prompted_t5 import forward
from mpt_jax.prompts import compose
from mpt_jax.prompts.files import load_prompts, save_prompts
from mpt_jax.setup import open_caches
from mpt_jax.stages import START_FILE, Stage, embedding_experiment, mixture_experiment
from mpt_jax.studies import interpret
from mpt_jax.train import run_training

SIMILARITIES = {
    "average_token": interpret.average_token_similarity,
    "per_token": interpret.per_token_similarity,
}


class Start(NamedTuple):
    """What one run on a target starts from.

    Attributes:
        sources: tasks, the most fitting first.
        ranked_by: of every source task: the loss in nats per target token, or the similarity.
    """

    sources: tuple[str, ...]
    ranked_by: dict[str, float]


def find_starts(
    stage: Stage, backbone: Backbone, vocabulary: Vocabulary, label: str = "", check: Callable[[], None] = lambda: None
) -> list[Start]:
    """Chooses each run's sources and writes the bank that its stage starts from; what an earlier call has chosen is read back.

    The bank has `stage.tries` prompts for each run, run by run.

    Args:
        label: put before every line of progress.
        check: of `run_training`.
    Raises:
        UserError: a bank that was made for other runs, teachers or by another retrieval.
        BadStepError: a training for it has diverged; says where its rate is set.
    """
    path = stage.folder / START_FILE
    assert stage.transfer is not None, stage.method
    retrieval = stage.transfer.retrieval
    made_for = {
        "tasks": [run.task for run in stage.runs for _ in range(stage.tries)],
        "seeds": [run.seed for run in stage.runs for _ in range(stage.tries)],
        "teachers": fingerprint.file_state(stage.start)[2],
        "retrieval": to_dict(retrieval),
    }
    if not path.exists():
        params, meta = load_prompts(stage.start)
        prompts = np.asarray(compose(meta["method"], params, tuple(meta["groups"])))
        if retrieval.by == "loss":
            values = source_losses(stage.experiment, backbone, vocabulary, prompts, retrieval.max_examples)
        else:
            own = _train(embedding_experiment(stage), "embedding", backbone, label, check)
            values = SIMILARITIES[retrieval.by]([*own, *prompts])[: len(own), len(own) :]
        starts = rank(retrieval, values, meta["tasks"])
        if retrieval.use == "mixture":
            mixture = mixture_experiment(stage, [start.sources for start in starts])
            bank = _train(mixture, "mixture", backbone, label, check)
        else:
            bank = combine(retrieval, prompts, meta["tasks"], starts)
        meta = made_for | {
            "groups": list(range(len(bank))),
            "scores": [None] * len(bank),
            "backbone": backbone.fingerprint,
            "starts": [start._asdict() for start in starts],
        }
        save_prompts(path, {"prompt": bank}, meta)
    meta = load_prompts(path)[1]
    different = [name for name, value in made_for.items() if value and meta.get(name, value) != json.loads(json.dumps(value))]
    if different or "starts" not in meta:
        how = f"with other {different[0]} than this study has now" if different else "by another version, which tells less of it"
        raise UserError(f"{path} was made {how}; delete {stage.folder}, or give another MODEL_DIR.")
    return [Start(tuple(start["sources"]), start["ranked_by"]) for start in meta["starts"]]


# -------------------------------------------------------------------------------------------------------------- the ranking


def rank(retrieval: RetrievalConfig, values: np.ndarray, sources: Sequence[str]) -> list[Start]:
    """The first `top` of the sources for each run, by losses or similarities [N,K]."""
    order = np.argsort(values if retrieval.by == "loss" else -values, axis=1, kind="stable")
    return [
        Start(tuple(sources[k] for k in ranks[: retrieval.top]), dict(zip(sources, row.tolist(), strict=True)))
        for ranks, row in zip(order, values, strict=True)
    ]


def source_losses(
    experiment: Experiment, backbone: Backbone, vocabulary: Vocabulary, prompts: np.ndarray, max_examples: int
) -> np.ndarray:
    """The loss of each source prompt [K,P,D] on the training examples of each of N streams: [N,K], nats per target token.

    Args:
        max_examples: of a stream, a fixed random part; 0 = all.
    """
    streams = experiment.data.streams
    caches = open_caches(experiment, [stream.task for stream in streams], experiment.data.train_split, vocabulary)
    batch_size, lengths = experiment.decode.batch_size, experiment.data.lengths
    rows = [k_shot_rows(cache, stream.k_shot, stream.seed) for stream, cache in zip(streams, caches, strict=True)]
    parts = [every[examined(len(every), max_examples)] for every in rows]
    return np.stack([prompt_losses(backbone, prompts, *one, lengths, batch_size) for one in zip(caches, parts, strict=True)])


def prompt_losses(
    backbone: Backbone, prompts: np.ndarray, cache: TokenCache, rows: np.ndarray, lengths: dict[str, int], batch_size: int
) -> np.ndarray:
    """Mean cross-entropy per target token of examples `rows` under each prompt [K,P,D] → [K] float64."""
    total, tokens = np.zeros(len(prompts)), 0.0
    evaluate = _make_losses(backbone.model)
    batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # a few examples fill no large batch
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        filled = np.concatenate([part, np.full(batch_size - len(part), part[-1])])  # one shape, one compilation
        batch = assemble(Examples([cache], np.zeros(batch_size, np.int32), filled), lengths)
        batch["loss_weights"][len(part) :] = 0
        total += np.asarray(evaluate(backbone.params, jnp.asarray(prompts), batch), np.float64)
        tokens += float(batch["loss_weights"].sum())
    return total / max(tokens, 1.0)


@functools.lru_cache(maxsize=8)
def _make_losses(model: T5) -> Callable[[Any, jax.Array, dict[str, np.ndarray]], jax.Array]:
    """The compiled (params, prompts [K,P,D], batch) → summed cross-entropy of each prompt [K]."""

    def losses(params: Any, prompts: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        size = batch["encoder_tokens"].shape[0]

        def one(prompt: jax.Array) -> jax.Array:
            output = forward(model, params, batch, jnp.repeat(prompt[None], size, axis=0))
            return cross_entropy(output.logits, batch["decoder_target_tokens"], batch["loss_weights"]).sum()

        return jax.lax.map(one, prompts)

    return jax.jit(losses)


# ------------------------------------------------------------------------------------------------------ what is made of them


def combine(retrieval: RetrievalConfig, prompts: np.ndarray, sources: Sequence[str], starts: Sequence[Start]) -> np.ndarray:
    """The chosen prompts one by one [N·top,P,D], or their weighted means [N,P,D]; `prompts` [K,P,D] are the sources'."""
    chosen = np.stack([[prompts[sources.index(source)] for source in start.sources] for start in starts])  # [N,top,P,D]
    if retrieval.use == "best":
        return chosen.reshape(-1, *prompts.shape[1:])
    values = np.array([[start.ranked_by[source] for source in start.sources] for start in starts])
    return np.einsum("nk,nkpd->npd", average_weights(values, retrieval.by), chosen).astype(np.float32)


def average_weights(values: np.ndarray, by: str) -> np.ndarray:
    """How much each source counts in a weighted average, [N,top] → [N,top] with sums of 1.

    Similarities count as they are (Vu et al. 2022, §5), those below 0 for nothing; losses by exp(-loss), the likelihood of a
    token. Where nothing counts, all count alike.
    """
    weights = np.exp(values.min(axis=1, keepdims=True) - values) if by == "loss" else np.maximum(values, 0.0)
    sums = weights.sum(axis=1, keepdims=True)
    return np.where(sums > 0, weights / np.where(sums > 0, sums, 1.0), 1 / values.shape[1])


def _train(experiment: Experiment, kind: str, backbone: Backbone, label: str, check: Callable[[], None]) -> np.ndarray:
    """The plain prompts [G,P,D] of one of `RetrievalConfig.stages`, `kind`."""
    try:
        return np.asarray(run_training(experiment, backbone, label=f"{label} {kind}:", check=check).params["prompt"])
    except BadStepError as error:
        error.settings = f"RetrievalConfig.stages['{kind}']"
        raise
