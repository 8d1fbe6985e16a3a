"""`liger_kernel.transformers.model`, a package whose modules are rows in `compat.ALIASES` or in `forwards`."""

__path__: list[str] = []
