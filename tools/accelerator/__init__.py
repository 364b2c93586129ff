"""The parts of `python -m tools.on_accelerator`: what one GPU can tell in minutes."""
