"""Arrays in, numbers for a report out: no stage, no data, no device. `imagen_jax.evals.measures` brings the arrays."""
