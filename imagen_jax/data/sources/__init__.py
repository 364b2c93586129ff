"""Sources of captioned images: one module for each kind, found by its name. Readers of lists of
prompts and captions are here too.

A source returns encoded images and captions unchanged; it must not know which of them are kept, nor
how prepared data are stored.
"""
