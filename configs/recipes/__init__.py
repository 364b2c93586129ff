"""Configs of the paper's models with changes: for published data sets (another number of steps, or
smaller models; docs/data-recipes.md prepares the data), and for images of several aspect ratios.
"""


def check_variant(arg: str) -> None:
    """Raises ValueError unless `arg` is a variant that every recipe has: "", "demo" or "tiny"."""
    if arg not in ("", "demo", "tiny"):
        raise ValueError(f"this recipe has no variant {arg!r}; use 'demo' or 'tiny'")
