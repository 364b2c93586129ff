"""Configs for published data sets: the configs of the paper's models with another number of steps,
or smaller ones. docs/data-recipes.md prepares the data.
"""
