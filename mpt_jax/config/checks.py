"""What the checks of a configuration are made of."""

import difflib
import re
from collections.abc import Iterable

from mpt_jax.errors import UserError


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of `names`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_local(field: str, path: str) -> None:
    """UserError for the path of a bucket where a local one is needed: only backbones and vocabularies are read from gs://."""
    if re.match(r"[a-z][a-z0-9+.-]*://", path):
        raise UserError(
            f"{field} is '{path}', but must be a local path; copy to and from a bucket with: "
            "gcloud storage rsync --recursive FROM TO (on a TPU: ./run_tpu.sh copy -- FROM TO)."
        )


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message + ".")


def choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} must be one of {', '.join(choices)}, not '{value}'.{nearest(str(value), choices)}")
