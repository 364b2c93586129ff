"""Frozen feature networks: images, or captions, to the vectors that metrics compare.

`network.py` has the interface and the networks by name, `preprocessing.py` what happens to an image
before its network, the other modules one architecture each. This folder must not know metrics,
stages, or where images come from.
"""
