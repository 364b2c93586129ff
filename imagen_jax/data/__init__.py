"""Captioned images: where they come from, how they lie on disk, how a training step gets its batch."""
