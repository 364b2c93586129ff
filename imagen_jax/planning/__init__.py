"""Predictions for hardware that is not available: memory, communication and time of a run.

Programs are compiled ahead of time and the text of the compiled program is analysed. It may import
everything except the commands. Only the command `plan` and tools may import it, and it must not run
a program on a device.
"""
