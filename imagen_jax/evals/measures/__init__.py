"""What is measured of a stage: one module for each measure, found by its name.

A measure reads an `Evaluation` and says how its result is printed, drawn and compared; it must not
know the command line, nor any other measure.
"""

import pkgutil

# Every module here but the one that says what a measure is. Listing them imports none of them.
NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "measure")
