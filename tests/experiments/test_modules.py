"""All experiments in one process: no flag of one is another's."""

import importlib
import pkgutil

import experiments


def test_all_experiments_are_importable_together():
    for module in pkgutil.iter_modules(experiments.__path__, "experiments."):
        importlib.import_module(module.name)
