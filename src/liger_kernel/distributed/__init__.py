"""Losses over a vocabulary whose classes are spread over the ranks of a group (tensor parallelism).

`shards.py`         which classes a rank holds, and the one collective that a loss needs
`cross_entropy.py`  cross entropy, of given logits or of hidden states
"""
