"""Evaluation of a stage: measures/ has the measures, the other modules the rows, errors and samples
that they read, and their arithmetic.

It must not know the command line or the training loop. The arithmetic must not know stages or data
either: arrays in, numbers out.
"""
