"""The last linear layer of a language model and a loss over its vocabulary, with one chunk of logits in memory.

`row_loss.py`    what a loss says: what it prepares from the labels, and what it does to a slab of logits
`losses/`        the losses, one a file, listed in `ROW_LOSSES`
`plan.py`        how many rows a chunk has, and what is held meanwhile
`groups.py`      rows that are weighed together, and the cuts that keep them together
`products.py`    the matrix products of a chunk
`loop.py`        the loop over the chunks
`node.py`        the autograd node, and `linear_loss`, the way in; `library.py`: the same as a node of a compiled graph
"""
