"""What the incumbent calls experimental; both modules are aliases, in `liger_kernel.compat`."""
