"""What prepare_data does with a source: check, select and store images, encode captions.

Estimates, worker processes and the Beam pipeline are here too. It must not know the command
line, nor any kind of source by name.
"""
