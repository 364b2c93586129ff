"""Imagen (Saharia et al. 2022, arXiv 2205.11487) in JAX.

It covers data preparation, text encoding, training of the cascaded diffusion models, sampling and
evaluation.

Commands, run as `python -m imagen_jax.<command>`; no module imports them: prepare_data, train,
sample, evaluate, plan, export, demo.

Modules shared by the commands:

    stage      builds a Stage from a config; the same object trains, samples and is evaluated
    cascade    runs stages one after another
    schema     declares every config field
    sharding   assigns arrays to devices
    storage    writes files atomically, with checksums
    run_log    records metrics and progress
    cli        parses command lines and reports errors
    pictures   reads and writes images

Everything else is in folders; each folder's docstring says what it contains.
"""

__version__ = "0.1.0"
