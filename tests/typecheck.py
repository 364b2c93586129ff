"""The run-time type checker that tests/conftest.py puts on every function of the package: beartype,
with ints accepted where a float is declared.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
