"""Train an IPAdapter-Instruct: datasets -> shards -> features -> train -> export -> evaluate; `python -m training`.

datasets -> features, with frozen -> train -> evaluate; instructions, configs and the miniature beside them.

Shapes in docstrings use the core's legend: B batch, N image patches, L text tokens, T adapter tokens, P latent
positions, D width, O token width; h and w are a latent's height and width.
"""
