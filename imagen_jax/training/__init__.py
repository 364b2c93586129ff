"""Code that only training uses.

It contains the train step, its objective and state, the optimizer, EMA tracks, the rules of
resuming, the metrics, validation, replica checks, sample grids and traces. It must not depend on
commands or on planning. It uses networks, data and checkpoints through `stage`, `data` and
`weights`; validation uses the errors of `evals`, which knows nothing of training.
"""
