"""Code that only training uses.

It contains the train step, its objective and state, the optimizer, EMA tracks, the rules of
resuming, the metrics, replica checks, sample grids and traces. It must not depend on commands, on
planning or on evaluation metrics. It uses networks, data and checkpoints through `stage`, `data`
and `weights`.
"""
