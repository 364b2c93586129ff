"""Where captioned images come from: one module for each kind of source, found by its name.

A source gives encoded images and captions as they are; it must not know what is kept of them, nor
how prepared data are stored.
"""
