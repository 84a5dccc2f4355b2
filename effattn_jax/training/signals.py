"""Ending a run in good order: a signal becomes a flag that the training loop polls."""

import signal
from types import FrameType
from typing import Any, Self


class StopSignal:
    """Within the context SIGTERM (schedulers send it before they kill) and the first SIGINT set `requested`.

    A second SIGINT raises KeyboardInterrupt. The former handlers return at the end. Main thread only.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first signal
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.received = self.received or signal.Signals(number).name
