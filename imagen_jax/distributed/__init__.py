"""Several processes, usually on as many hosts, that train as one: how they find each other, what
they agree on, and who is at fault when they wait.

It must not know what is trained; `start()` is all that a verb calls, and a single process starts
nothing.
"""

from imagen_jax.distributed.startup import start

__all__ = ["start"]
