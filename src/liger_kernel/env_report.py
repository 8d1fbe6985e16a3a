"""`python -m liger_kernel.env_report`: what a bug report should contain; the same as `liger_kernel env`."""

from __future__ import annotations

import sys

from liger_kernel.cli.app import main


def print_env_report() -> None:
    """Print the versions, devices, variables and kernels of this installation."""
    main(["env"])


if __name__ == "__main__":
    sys.exit(main(["env", *sys.argv[1:]]))
