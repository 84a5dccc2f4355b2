"""The config that a run has stored with itself.

    python -m experiments.generate --config=configs/run.py:runs/hybrid --workdir=runs/hybrid --prompt="def "

`runs/hybrid/config.json` is read; `--config.<field>=<value>` overrides a field.
"""

import json
import os

from ml_collections import ConfigDict

from configs.common import base
from effattn_jax import checks

TUPLES = ("pattern", "before", "after")


def get_config(workdir: str = "") -> ConfigDict:
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        checks.fail("config", f"no {path}", "--config=configs/run.py:<directory of a run>")
    with open(path) as file:
        stored = json.load(file)
    config = base()
    for part, fields in stored.items():
        if not isinstance(fields, dict):
            config[part] = fields
            continue
        for name, value in fields.items():
            with config.ignore_type():
                config[part][name] = tuple(value) if name in TUPLES else value
    return config
