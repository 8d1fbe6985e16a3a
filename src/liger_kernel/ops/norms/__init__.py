"""What the ops that normalise rows share: casting modes here, kernels in `kernels.py`."""

#: casting mode -> the code that the incumbent's helpers return and take
CASTING_MODES = {"llama": 0, "gemma": 1, "none": -1}
