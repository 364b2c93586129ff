"""Everything that only a training needs: the step, the objective it minimises, its state, the
optimizer, EMA tracks, the rules of resuming, replica checks, sample grids.

It must not know verbs or planning, nor how a measure is computed; networks, data and checkpoints
reach it through `stage`, `data` and `weights`.
"""
