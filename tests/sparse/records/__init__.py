"""The sparse mechanisms under test: a module of records for each, `RECORDS`."""

import importlib
import pkgutil

MECHANISMS = [
    record
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__))
    for record in importlib.import_module(f"{__name__}.{module}").RECORDS
]
