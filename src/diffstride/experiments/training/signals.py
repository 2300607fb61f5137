"""The end of a training of several processes: when one is asked to end, or dies, all end."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from lightning.pytorch import Trainer


class EndTogether:
    """An agreement of all processes to end between the same two steps when one of them gets SIGINT or SIGTERM.

    A process that ended alone would leave the others waiting for it. So a signal is only noted, and after each step
    the processes agree whether any of them has one. All then end as Lightning ends a training on SIGTERM. If they
    cannot agree within `GRACE` seconds, because a process hangs or a validation takes long, the process that got the
    signal is killed, and the others follow it.
    """

    GRACE = 20  # seconds; clusters mostly wait for 30 before they kill

    def __init__(self) -> None:
        self._asked, self._process = False, os.getpid()

    def listen(self, trainer: Trainer) -> None:
        """Note signals from now on. Lightning restores the earlier handlers at its end."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)  # Lightning's own waits for the others within the handler

    def _note(self, *_: Any) -> None:
        if self._asked or os.getpid() != self._process:  # the workers of a data loader inherit the handler
            return
        self._asked = True
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which kills the process
        signal.alarm(self.GRACE)

    def agree(self, trainer: Trainer) -> None:
        """End the training if any process has noted a signal. All processes must call this at the same step."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            signal.alarm(0)
            trainer._signal_connector.received_sigterm = True  # Lightning checks it after the loggers


def end_with_parent() -> None:
    """End this process soon after its parent, for which it would otherwise wait for minutes."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
