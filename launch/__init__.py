"""Starts trainings and other commands on this machine or on a cluster.

Run it in the root directory of a checkout of the repository: configs/ and launch/ are not part of
the installed package. With only the package installed, `python -m launch` ends with
"No module named launch"; clone the repository, or run `python -m imagen_jax.train` directly.
"""
