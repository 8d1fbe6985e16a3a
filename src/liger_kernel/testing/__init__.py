"""What tests and benchmarks share: named cases, hard inputs, and the project's one tolerance.

Nothing at run time imports this package.
"""

from liger_kernel.testing.cases import Inputs, Make, OpCase, OpSpec, case, specs
from liger_kernel.testing.compare import assert_draws_no_worse, assert_no_worse

__all__ = [
    "Inputs",
    "Make",
    "OpCase",
    "OpSpec",
    "assert_draws_no_worse",
    "assert_no_worse",
    "case",
    "specs",
]
