"""The run's folder, MODEL_DIR: its configuration, and the mark of a finished run.

config.json     the resolved configuration, written when the run begins
finished.json   {"step", "backbone", "seconds"}, written last; such a run is not trained again
"""

import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from mpt_jax.config import Experiment, to_dict
from mpt_jax.errors import UserError
from mpt_jax.files import write_text

# What two calls may differ in and still be of one experiment: places, speed, what is written when.
FREE = frozenset(
    "train.model_dir train.log_period train.checkpoint_period train.keep_checkpoints train.tensorboard train.num_microbatches "
    "data.cache_dir data.trim_lengths data.pack_lengths data.pack_rows data.task_modules data.tfds_data_dir decode.batch_size "
    "backbone.architecture.remat partition distributed infer export inspect bench".split()
)
# A run may also become longer, treat bad steps in another way, and validate at other steps; but always on the same examples and
# in the same way, for the best score so far stands for ever.
FREE_IN_A_RUN = FREE | {f"train.{name}" for name in "steps eval_period spike_factor on_bad_step max_skipped_steps".split()}


class RunFolder:
    """MODEL_DIR of one run. It is made when a run begins in it."""

    def __init__(self, model_dir: str):
        self.path = Path(model_dir).expanduser()

    def begin(self, experiment: Experiment) -> None:
        """Make the folder and write config.json, after comparing it with that of the run that lies here already.

        Raises:
            UserError: the folder cannot be made or written, holds a study, or another run; names the first field that differs.
        """
        if self.is_study():
            raise UserError(
                f"MODEL_DIR {self.path} holds a study, whose files a single run would write over; give another MODEL_DIR, or "
                "continue the study with `pipeline`."
            )
        path = self.path / "config.json"
        new = json.loads(json.dumps(to_dict(experiment)))
        if path.exists() and self.has_progress():
            for name, before, after in differences(self.config(), new, FREE_IN_A_RUN):
                raise UserError(
                    f"MODEL_DIR {self.path} holds a run with {name}={before!r}, but now it is {after!r}; "
                    "give the old value to continue that run, or another MODEL_DIR."
                )
        self.write("config.json", new)

    def is_study(self) -> bool:
        """Whether `pipeline` has begun a study here."""
        return (self.path / "results.jsonl").exists() or "base" in self.config()

    def config(self) -> dict[str, Any]:
        """config.json, {} where there is none that can be read."""
        try:
            config = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    def has_progress(self) -> bool:
        """Whether a run has left a whole checkpoint or its result here."""
        checkpoints = self.path / "checkpoints"
        if (self.path / "finished.json").exists():
            return True
        return checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())

    def finished(self) -> dict[str, Any] | None:
        """finished.json, or None while the run is not finished."""
        try:
            return json.loads((self.path / "finished.json").read_text())
        except (OSError, ValueError):
            return None

    def finish(self, step: int, fingerprint: str, seconds: float) -> None:
        """The last thing that a run writes."""
        self.write("finished.json", {"step": step, "backbone": fingerprint, "seconds": round(seconds, 2)})

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, into a folder that is made if need be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / name, json.dumps(value, indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"Cannot write into MODEL_DIR '{self.path}' ({error.strerror}); give a folder that you may write to.")


def differences(old: Any, new: Any, free: Set[str], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of the fields that both configurations have and that differ, but for the `free` ones."""
    if prefix in free:
        return
    # A task of one's own is one thing: a label that only one side has is no field of another version.
    if isinstance(old, dict) and isinstance(new, dict) and not prefix.endswith("data.own_tasks"):
        for name in (name for name in new if name in old):
            yield from differences(old[name], new[name], free, f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield prefix, old, new
