"""`python -m liger_kernel`."""

from __future__ import annotations

import sys

from liger_kernel.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
