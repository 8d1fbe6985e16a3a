"""Where HF's Trainer looks for the entry point."""

from liger_kernel.transformers.monkey_patch import _apply_liger_kernel as _apply_liger_kernel
