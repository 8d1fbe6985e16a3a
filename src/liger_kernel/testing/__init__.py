"""What tests and benchmarks share: named cases, hard inputs, and the project's one tolerance.

Nothing at run time imports this package.
"""

from liger_kernel.testing.cases import Make, OpCase, OpSpec, specs
from liger_kernel.testing.compare import assert_no_worse

__all__ = ["Make", "OpCase", "OpSpec", "assert_no_worse", "specs"]
