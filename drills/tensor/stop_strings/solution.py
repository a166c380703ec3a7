"""Stop strings in a stream of text.

StopStream(stops): stops is a list of non-empty strings, maybe none.
push(text) takes the next piece and returns what may be shown now; close() returns what is still held back, once the
text is over. `done` (bool) says whether a stop string was found.
The text ends before the stop string that is complete first, that is, whose last character comes first; of several that
end at one character, before the longest. The stop string and all that follows are never shown. Everything else is shown
as early as possible: only the longest end of the text that may be the start of a stop string is held back. What is
shown in total does not depend on where the pieces are cut.

    >>> stream = StopStream(["END", "USER:"])
    >>> stream.push("an E"), stream.push("Nd, E"), stream.push("N"), stream.push("D. More"), stream.done
    ('an ', 'ENd, ', '', '', True)
    >>> stream = StopStream(["END"])
    >>> stream.push("EN"), stream.close()
    ('', 'EN')
"""


class StopStream:
    def __init__(self, stops: list[str]) -> None:
        self.stops = stops
        self.held = ""
        self.done = False

    def push(self, text: str) -> str:
        shown = ""
        for character in text:
            if self.done:
                break
            self.held += character
            complete = [len(stop) for stop in self.stops if self.held.endswith(stop)]
            if complete:
                shown += self.held[: -max(complete)]
                self.held, self.done = "", True
                break
            keep = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
            cut = len(self.held) - keep
            shown += self.held[:cut]
            self.held = self.held[cut:]
        return shown

    def close(self) -> str:
        held, self.held = self.held, ""
        return held
