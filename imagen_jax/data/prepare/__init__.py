"""The passes of prepare_data over a source: check, select, encode, write.

Estimates, worker processes and work on several hosts are here too. It must not know the command
line, nor any kind of source by name.
"""
