"""Text to features: the interface of a frozen text encoder, the T5 v1.1 network, its tokenizer and its pass over a mesh.

It must not know where weights are stored (`weights` loads them), nor what is done with features.
"""
