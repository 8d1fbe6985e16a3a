"""Losses over a vocabulary whose classes are spread over the ranks of a group (tensor parallelism).

`shards.py`  which classes a rank holds, and the one collective that a loss needs
`vocab_parallel_cross_entropy/`, `vocab_parallel_logprobs/`  the losses, of given logits and of hidden states
"""
