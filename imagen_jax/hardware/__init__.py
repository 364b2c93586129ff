"""Facts about accelerators, TPUs and GPUs: speed, memory and links, each with its source.

Also the names of topologies. It must not know programs, networks or configs: `planning` applies
these facts to compiled programs.
"""
