"""Memory, traffic and step time of a run on hardware that is not here: programs are compiled ahead
of time and their text is read.

It may import all but the verbs; nothing but the verb `plan` and tools may import it, and it must
not run a program on a device.
"""
