"""SIGTERM and SIGINT as a question that a loop can ask."""

import contextlib
import logging
import signal
import threading
from typing import Any

logger = logging.getLogger(__name__)


class StopFlag:
    """Set by the first SIGTERM or SIGINT; the second does what it did before.

    Signals that are ignored (nohup) stay so; outside the main thread nothing is set.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(signum)
                if before is not signal.SIG_IGN:  # nohup and the like mean it
                    self._before[signum] = before or signal.SIG_DFL
                    signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.is_set = True
        self.uninstall()
        # A print interrupted by this signal may not be entered again.
        with contextlib.suppress(RuntimeError):
            logger.warning(
                "%s received: saving and stopping after this step; again to stop now",
                signal.Signals(signum).name,
            )

    def uninstall(self) -> None:
        """Gives the signals back to whoever had them."""
        for signum, before in self._before.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, before)
