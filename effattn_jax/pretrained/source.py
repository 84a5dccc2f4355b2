"""Where a model came from: its published config, carried by the model so that it can be written back."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Hashable, as all that a module holds beside arrays must be."""

    config_json: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Source":
        return cls(json.dumps(config))

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.config_json)
        return found
