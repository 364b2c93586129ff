"""Text to features: the interface of a frozen text encoder, its pass over a mesh, networks.

`encoder.py` has the interface, and its implementation for any Flax network; `t5.py` is a network.
It must not know where weights are stored (`weights` loads them), nor what features are used for.
"""
