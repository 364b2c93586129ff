"""Several processes, usually on several hosts, that train as one.

They find each other, compare their settings, and name the process that the others wait for. It must
not know what is trained. A command calls `start()`, which does nothing in a single-process run.
"""

from imagen_jax.distributed.startup import start

__all__ = ["start"]
