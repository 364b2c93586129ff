"""Facts about accelerators, each with its source, and the names of their topologies.

It must not know programs, networks or configs: `planning` applies these facts to what a compiler makes.
"""
