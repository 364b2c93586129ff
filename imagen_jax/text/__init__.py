"""Text to features: the interface of a frozen text encoder, its program on a mesh, and networks.

`encoder.py` has the interface and its implementation for any Flax network, `program.py` the jitted
forward pass, `tokenizer.py` text to token ids, `t5_network.py`, `bert_network.py` and `clip.py` the
networks, `choice.py` the choice of a layer and pooled vector. This folder must not know where
weights are stored (`weights` loads them) or what features are used for.
"""
