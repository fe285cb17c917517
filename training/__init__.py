"""The mechanics that all training stages share: run folder, loop, optimiser, EMA, checkpoints, metrics.

Nothing here knows a network or a dataset. Imported by entry points, by configs (for the dataclasses) and by eval.
"""
