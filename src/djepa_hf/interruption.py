"""Being asked to stop: by a scheduler that needs the machine, or by a person."""

import signal
from types import FrameType


class StopSignals:
    """
    Remembers SIGTERM and SIGUSR1, which clusters send ahead of taking a machine away, instead of dying of them.

    `name` is the signal's name once one has come, `None` before.
    """

    def __init__(self):
        self.name: str | None = None
        for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):
            if number is not None:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None):
        self.name = signal.Signals(number).name
