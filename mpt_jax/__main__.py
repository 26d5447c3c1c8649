"""`python -m mpt_jax COMMAND …`; the console script `mpt-jax` is the same."""

import sys

from mpt_jax.cli import main


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
