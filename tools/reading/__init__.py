"""The parts of `python -m tools.reader_speed`: how fast images are read and decoded."""
