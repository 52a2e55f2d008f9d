"""``python -m q8lightning``: the command line."""

import sys

_EXTRA = ("rich", "yaml")
"""Packages of the extra ``cli``."""


def run() -> int:
    """Run the command line, or print in one line which package it needs."""
    try:
        from q8lightning.cli.main import main

        return main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        remedy = 'pip install "q8lightning[cli]"'
        print(f"q8lightning: error: the command line needs {missing}; {remedy}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
