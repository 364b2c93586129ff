"""Imagen (Saharia et al. 2022, arXiv 2205.11487) in JAX: text encoder, cascaded diffusion, training, sampling, evaluation."""

__version__ = "0.1.0"
