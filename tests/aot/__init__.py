"""Every kernel compiled, ahead of time, for GPUs that are not there: `python -m tests.aot`.

`targets` says what each GPU is like, `record` runs the ops on a pretended one and notes what would be launched, `build`
compiles and measures one launch, `proof` does so for all of them, and `table` writes down what was found.
"""
