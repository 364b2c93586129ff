"""Evaluation: `measures/` has the measures, the other modules the rows, errors and samples that
they read, and their arithmetic. Feature networks and prompt suites belong here too.

It must not know the command line or the training loop. The arithmetic must not know stages or data
either: arrays in, numbers out.
"""
