"""What a trained prompt is near to: words (Lester et al. 2021, §7), its own start, other prompts (Vu et al. 2022, SPoT, §5).

Pure functions of NumPy arrays. Prompts are composed, [P,D], without the zeros before a shorter prompt of a bank; P may differ
from prompt to prompt. Directions are compared by their cosine, and a vector of zeros is similar to nothing (0).
"""

from collections.abc import Collection, Sequence

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    """Each vector [...,D] with norm 1; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def cosine_similarity(rows: np.ndarray) -> np.ndarray:
    """[N,D] → [N,N]."""
    directions = unit(rows)
    return directions @ directions.T


# ------------------------------------------------------------------------------------------------------- words and labels


def nearest_pieces(prompt: np.ndarray, embedding: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k pieces whose embeddings have the highest cosine with each token of a prompt (Lester et al. 2021, §7).

    Args:
      prompt: [P,D].
      embedding: [V,D], of the ids that the vocabulary has only: a T5's own V is padded, and nobody trained the rest.
      k: at most V.

    Returns:
      (ids [P,k], cosines [P,k]), the nearest first; of equally near ones the lowest id first.
    """
    if not 0 < k <= len(embedding):
        raise ValueError(f"k must be from 1 to {len(embedding)}, the number of pieces, not {k}")
    cosines = unit(prompt) @ unit(embedding).T
    ids = np.argsort(-cosines, axis=-1, kind="stable")[:, :k]
    return ids, np.take_along_axis(cosines, ids, axis=-1)


def mean_pair_cosine(vectors: np.ndarray) -> np.ndarray:
    """The mean cosine over all pairs of different vectors of a set: [...,n,D] → [...], n at least 2.

    Of the k nearest pieces of a token, `embedding[ids]` [P,k,D], this is the token's **purity** [P]: how tight a cluster its
    neighbours are. Of a whole embedding [V,D] it is exactly what k pieces drawn at random have on the mean, whatever k.
    The neighbours of any vector are more alike than random pieces, though, for all of them are near that vector; so a purity
    is to be compared with that of random directions' neighbours, too (`purity_of_random_directions`), and with that of the
    prompt before it was trained.
    """
    count = vectors.shape[-2]
    if count < 2:
        raise ValueError(f"there are no pairs among {count} vectors")
    directions = unit(np.asarray(vectors, np.float64))
    both = np.sum(directions.sum(axis=-2) ** 2, axis=-1) - np.sum(directions**2, axis=(-2, -1))
    return np.asarray(both / (count * (count - 1)))


def purity_of_random_directions(embedding: np.ndarray, k: int, directions: int = 100, seed: int = 0) -> float:
    """The mean purity among the k nearest pieces of random directions: what a prompt that means nothing has. [V,D] → number."""
    drawn = np.random.default_rng(seed).normal(size=(directions, embedding.shape[1])).astype(np.float32)
    ids, _ = nearest_pieces(drawn, embedding, k)
    return float(mean_pair_cosine(embedding[ids]).mean())


def tokens_near(nearest: np.ndarray, pieces: Collection[int]) -> np.ndarray:
    """Which tokens have one of the pieces among their neighbours `nearest` [P,k] (ids): bool [P].

    With the pieces of the class labels this is their persistence: Lester et al. (§7) find labels among the nearest pieces of
    trained prompts, above all of those that had started as labels.
    """
    return np.asarray(np.isin(nearest, np.asarray(sorted(pieces), nearest.dtype)).any(axis=-1))


# ------------------------------------------------------------------------------------------------------------------ drift


def drift(prompt: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each token has gone from where it started.

    Args:
      prompt, start: [P,D].

    Returns:
      (cosine with the start [P], |prompt - start| / |start| [P]); the second is NaN for a token that started at zero.
    """
    cosines = np.sum(unit(prompt) * unit(start), axis=-1)
    norms = np.linalg.norm(start, axis=-1)
    moved = np.linalg.norm(prompt - start, axis=-1)
    return cosines, np.divide(moved, norms, out=np.full_like(moved, np.nan), where=norms > 0)


# ------------------------------------------------------------------------------------------- prompts as embeddings of tasks


def average_token(prompt: np.ndarray) -> np.ndarray:
    """[P,D] → [D]: the task's embedding of `average_token_similarity`."""
    return np.asarray(prompt.mean(axis=0, dtype=np.float64))


def average_direction(prompt: np.ndarray) -> np.ndarray:
    """[P,D] → [D], at most of norm 1: the task's embedding of `per_token_similarity`."""
    return np.asarray(unit(prompt).mean(axis=0, dtype=np.float64))


def average_token_similarity(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """SPoT's "cosine similarity of average tokens" (§5): the cosine of the prompts' mean tokens. N of [P,D] → [N,N].

    Neither the order of the tokens nor the scale of a whole prompt matters; a prompt is similar to itself by 1.
    """
    return cosine_similarity(np.stack([average_token(prompt) for prompt in prompts]))


def per_token_similarity(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """SPoT's "per-token average cosine similarity" (§5). N of [P,D] → [N,N].

    The mean of cos(a, b) over all pairs of a token a of one prompt and a token b of the other, which is the product of their
    average directions. The norm of no token matters. A prompt's similarity to itself is below 1 unless its tokens all point one
    way, and it may be more similar to another prompt than to itself.
    """
    directions = np.stack([average_direction(prompt) for prompt in prompts])
    return np.asarray(directions @ directions.T)
