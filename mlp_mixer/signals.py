"""Turns SIGTERM and SIGINT into a flag that a loop can ask."""

import contextlib
import logging
import signal
import threading
from typing import Any

logger = logging.getLogger(__name__)


class StopFlag:
    """A flag that the first SIGTERM or SIGINT sets; the second acts as usual.

    Signals that were ignored (nohup) stay ignored. Outside of the main thread the flag
    is never set.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(signum)
                if before is not signal.SIG_IGN:
                    self._before[signum] = before or signal.SIG_DFL
                    signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.is_set = True
        self.uninstall()
        # A print that this signal interrupts cannot be entered again.
        with contextlib.suppress(RuntimeError):
            logger.warning(
                "%s received: saving and stopping after this step; again to stop now",
                signal.Signals(signum).name,
            )

    def uninstall(self) -> None:
        """Restores the former handlers."""
        for signum, before in self._before.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, before)
