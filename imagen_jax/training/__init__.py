"""Training only: the step, its objective and state, the optimizer, EMA tracks, the rules of
resuming, the record of metrics, replica checks, sample grids, traces.

It must not know verbs or planning, or how a measure is computed. It uses networks, data and
checkpoints through `stage`, `data` and `weights`.
"""
