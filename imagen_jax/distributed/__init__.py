"""Several processes, usually on as many hosts, that train as one: how they find each other, and who is at fault when they wait.

`start()` is all that a verb calls; one process alone needs nothing of it and nothing is started for it.
"""

from imagen_jax.distributed.startup import start

__all__ = ["start"]
