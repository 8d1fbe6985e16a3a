"""Losses over a vocabulary whose classes are spread over the ranks of a group (tensor parallelism), and experts.

`shards.py`  which classes a rank holds, and the one collective that a loss needs
`vocab_parallel_cross_entropy/`, `vocab_parallel_logprobs/`  the losses, of given logits and of hidden states
`expert_parallel.py`  a mixture of experts of all ranks, each with tokens of its own
"""
