"""The folder that all contenders read: random weights as a Hugging Face folder, the prompt's start, and every batch.

    model/              T5 1.1 by our initialisers, exported; no token is ever EOS or padding, so that all outputs are full
    prompt.npy          [P, D] float32, embeddings of the vocabulary (Lester et al. 2021, section 3.2)
    batches/<set>/<n>.npz

The sets: `full`, rows without padding; of a task `padded` (to the longest of the batch, inputs and targets, as
transformers' DataCollatorForSeq2Seq does), and mpt_jax's `trimmed`, `sorted` and `packed` of the same examples
(docs/speed.md). `padded`, `trimmed` and `packed` have the same examples in each batch, `sorted` in each window of batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.settings import EMBEDDED, Settings
from mpt_jax.checkpoint.backbone import ASSETS
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.config import DataConfig
from mpt_jax.data.cache import TokenCache, open_task
from mpt_jax.data.layout import Examples, assemble
from mpt_jax.data.sampling import Loader, make_loader, stream_data
from mpt_jax.data.vocabulary import FILE_NAMES, load_vocabulary
from mpt_jax.models.t5 import init_params

NEVER = slice(0, 2)  # ids of padding and EOS
FINE, COARSE = 16, 32  # steps of trim lengths up to 128 positions, and above


def write_model(settings: Settings, folder: Path) -> None:
    config = settings.architecture
    params = init_params(config, jax.random.key(settings.seed))
    kernel = params["decoder"]["logits_dense"]["kernel"]
    # Their logits are 0; the largest of thousands of random ones never is less.
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, NEVER].set(0)
    export_hf(jax.device_get(params), config, folder / "model", dtype=settings.dtype)
    embedding = params["token_embedder"]["embedding"].astype(jnp.float32)
    ids = np.random.default_rng(settings.seed).integers(2, config.vocab_size, settings.prompt)
    np.save(folder / "prompt.npy", np.asarray(embedding[ids]))


def full_batch(settings: Settings) -> dict[str, np.ndarray]:
    """Random tokens; every position is one."""
    rng = np.random.default_rng(settings.seed)
    encoder, targets = (
        rng.integers(2, settings.architecture.vocab_size, (settings.batch, length)).astype(np.int32)
        for length in (settings.inputs, settings.targets)
    )
    return {
        "encoder_tokens": encoder,
        "decoder_input_tokens": np.concatenate([np.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1),
        "decoder_target_tokens": targets,
        "loss_weights": np.ones(targets.shape, np.float32),
        "task_ids": np.zeros(settings.batch, np.int32),
    }


def padded(loader: Loader, cache: TokenCache, step: int, settings: Settings) -> dict[str, np.ndarray]:
    """The examples of the loader's batch, each kind of token padded to the longest."""
    examples = Examples([cache], *loader.draw(step))
    most = {"inputs": settings.inputs, "targets": settings.targets}
    return assemble(examples, {name: int(min(examples.counts(name).max(), limit)) for name, limit in most.items()})


def task_sets(settings: Settings, folder: Path) -> dict[str, Any]:
    """Writes the sets of `settings.tasks` (one task here) and returns what they hold."""
    file = next(path for name in FILE_NAMES if (path := ASSETS / "mini" / name).exists())
    vocabulary = load_vocabulary(str(file) if settings.vocabulary == EMBEDDED else settings.vocabulary)
    task, limit = settings.tasks, {"inputs": settings.inputs, "targets": settings.targets}
    cache = open_task(DataConfig(task, limit, settings.batch, cache_dir=str(folder / "cache")), task, "train", vocabulary)
    longest = {name: int(min(cache.token_counts(name).max(), limit[name])) for name in limit}
    trims = (*range(FINE, 128, FINE), *range(128, longest["inputs"], COARSE))
    row = -(-(settings.prompt + longest["inputs"]) // COARSE) * COARSE
    ways: dict[str, dict[str, Any]] = {
        "trimmed": {"trim_lengths": trims},
        "sorted": {"trim_lengths": trims, "sort_window": settings.batches},
        "packed": {"pack_lengths": {"inputs": row, "targets": max(row // 8, longest["targets"])}},
    }
    stream = stream_data(cache)
    devices = settings.host_devices if settings.device == "cpu" else 1
    found: dict[str, Any] = {"longest": longest, "mean": {name: float(cache.token_counts(name).mean()) for name in limit}}
    chosen = {"trimmed", *settings.ways.split(",")}
    for name, fields in ((name, fields) for name, fields in ways.items() if name in chosen):
        data = DataConfig(task, longest, settings.batch, **fields)
        loader = make_loader(data, [stream], settings.prompt, devices)
        found[name] = write_set(folder, name, [loader.batch(step) for step in range(settings.batches)], settings)
        if name == "trimmed":
            batches = [padded(loader, cache, step, settings) for step in range(settings.batches)]
            found["padded"] = write_set(folder, "padded", batches, settings)
    return found


def write_set(folder: Path, name: str, batches: list[dict[str, np.ndarray]], settings: Settings) -> dict[str, Any]:
    place = folder / "batches" / name
    place.mkdir(parents=True)
    shapes = []
    for number, batch in enumerate(batches):
        np.savez(place / f"{number:03}.npz", allow_pickle=False, **batch)
        rows, positions = batch["encoder_tokens"].shape
        soft = 0 if "encoder_segments" in batch else settings.prompt
        shapes.append([rows, positions + soft, batch["decoder_target_tokens"].shape[1]])
    return {"encoder_positions": sum(rows * positions for rows, positions, _ in shapes), "shapes": shapes}


def main() -> None:
    settings, folder = Settings(**json.loads(sys.argv[1])), Path(sys.argv[2])
    write_model(settings, folder)
    found = (
        task_sets(settings, folder) if settings.tasks else {"full": write_set(folder, "full", [full_batch(settings)], settings)}
    )
    (folder / "batches.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
