"""Starts trainings and other verbs on this machine or on a cluster.

Runs from a checkout of the repository, started in its root directory: configs/ and launch/ are
not part of the installed package. With only the package installed, `python -m launch` ends with
"No module named launch"; clone the repository, or run `python -m imagen_jax.train` directly.
"""
