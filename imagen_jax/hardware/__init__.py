"""Facts about accelerators, TPUs and GPUs alike: speed and memory, each with its source, and the
names of topologies.

It must not know programs, networks or configs: `planning` applies these facts to what a compiler
makes.
"""
