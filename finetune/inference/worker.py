"""The thread in which an engine runs, and how requests of other threads get in and out of it."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable

from finetune.inference.engine import Engine
from finetune.inference.scheduler import Sequence

Listener = Callable[[Sequence], None]


class Worker(threading.Thread):
    """Runs `engine` until `stop`. Only this thread touches the engine: others hand it functions, which it calls between
    two steps. `listeners[sequence]` is called in this thread whenever the sequence got tokens."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.listeners: dict[Sequence, Listener] = {}
        self.failure: Exception | None = None  # of a step: the engine has stopped

    def call(self, function: Callable[[], None]) -> None:
        """`function` is called in this thread before the next step. It must not raise."""
        self.inbox.put(function)

    def cancel(self, sequences: list[Sequence]) -> None:
        """Ends sequences that are not finished; called in this thread."""
        for sequence in sequences:
            self.listeners.pop(sequence, None)
            if not sequence.finish_reason:
                sequence.finish_reason = "cancelled"
                self.engine.end(sequence)

    def stop(self) -> None:
        """Ends the thread after the requests that are in the engine."""
        self.inbox.put(None)

    def run(self) -> None:
        try:
            self.serve()
        except Exception as error:
            self.failure = error
            traceback.print_exc()
            self.fail()
            while (function := self.inbox.get()) is not None:  # nobody waits for an answer that cannot come
                function()
                self.fail()

    def serve(self) -> None:
        """Steps until `stop`, and then until nothing is left to do."""
        open_ = True
        while open_ or self.engine.busy:
            while open_ and (not self.engine.busy or not self.inbox.empty()):
                function = self.inbox.get()
                open_ = function is not None
                if function:
                    function()
            for sequence in self.engine.step():
                if listener := self.listeners.get(sequence):
                    if sequence.finish_reason:
                        del self.listeners[sequence]
                    listener(sequence)

    def fail(self) -> None:
        """Tells everyone that the engine has stopped."""
        while self.listeners:
            sequence, listener = self.listeners.popitem()
            sequence.finish_reason = "error"
            listener(sequence)
