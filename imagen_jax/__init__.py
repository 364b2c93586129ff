"""Imagen (Saharia et al. 2022, arXiv 2205.11487) in JAX: text encoder, cascaded diffusion,
training, sampling, evaluation.

Verbs, run as `python -m imagen_jax.<verb>` and imported by nobody: prepare_data, train, sample,
evaluate, plan, export, demo.

Modules that they share: `stage` (config -> Stage, the object that trains, samples and is
evaluated), `cascade` (stages chained), `schema` (every config field), `sharding` (where arrays
live), `storage` (files that appear whole, checksums), `run_log` (metrics and progress), `cli`
(command lines), `pictures`. Everything else is in the folders; each says what lives there.
"""

__version__ = "0.1.0"
