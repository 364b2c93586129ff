"""Predictions for hardware that is not available: memory, communication and time of a run.

Programs are compiled ahead of time, and the text of the compiled program is analysed. This package
may import everything except the commands. Only the command `plan` and tools may import it. It must
not run a program on a device.
"""
