"""`liger_kernel.transformers.model`, a package of the incumbent; its modules are rows in `compat.ALIASES`."""

__path__: list[str] = []
