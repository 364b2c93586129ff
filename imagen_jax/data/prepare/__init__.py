"""The work of prepare_data on a source: checks of each image, the selection of what is kept,
estimates, worker processes, several hosts.

It must not know the command line, nor any kind of source by name.
"""
