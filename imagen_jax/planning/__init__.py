"""What a run needs of hardware that is not here: its programs compiled ahead of time, their text read, and memory, traffic and step time estimated.

It may import all but the verbs; nothing but the verb `plan` and tools may import it, and it must not run a program on a device.
"""
