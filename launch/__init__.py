"""Starting many runs, or one run on many machines."""
