"""`python -m mpt_jax COMMAND …`; the console script `mpt-jax` is the same."""

import sys

from mpt_jax import signals


def run() -> None:
    """Entry point of the console script."""
    try:
        from mpt_jax.cli import main  # here, so that a Python without the requirements can be told from a broken program

        code = main()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        # Without gin-config, Python takes the folder gin/ of a checkout for an empty package of that name.
        missing = isinstance(error, ModuleNotFoundError) or package == "gin"
        if not missing or package in ("", "mpt_jax"):
            raise
        print(
            f"error: {sys.executable or 'this Python'} has no package '{package}', which mpt_jax needs; run `make install` once, "
            "then `source .venv/bin/activate`, and the same command again.",
            file=sys.stderr,
        )
        code = 2
    if code > 128:  # interrupted: an orderly end would wait for what other threads are still compiling
        sys.stdout.flush()
        signals.end(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
