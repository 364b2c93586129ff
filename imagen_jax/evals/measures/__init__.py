"""The measures of a stage: one module for each, found by its name.

A measure reads an `Evaluation` and defines how its result is printed, plotted and compared. It must
not know the command line or any other measure.
"""

import pkgutil

# All modules except the one that defines the interface. Listing them imports none of them.
NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "measure")
