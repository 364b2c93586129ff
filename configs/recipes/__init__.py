"""Configs for published data sets: the configs of the paper's models with another number of steps,
or smaller ones. docs/data-recipes.md prepares the data.
"""


def check_variant(arg: str) -> None:
    """Raises ValueError unless `arg` is a variant that every recipe has: "", "demo" or "tiny"."""
    if arg not in ("", "demo", "tiny"):
        raise ValueError(f"this recipe has no variant {arg!r}; use 'demo' or 'tiny'")
