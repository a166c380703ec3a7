class StopStream:
    def __init__(self, stops):
        self.stops, self.text, self.shown, self.done = stops, "", 0, False

    def push(self, text):
        if self.done:
            return ""
        self.text += text
        found = [(at + len(s), at) for s in self.stops if (at := self.text.find(s)) >= 0]
        if found:
            self.done = True
            return self.upto(min(found)[1])
        starts = [
            i for i in range(max(0, self.shown), len(self.text)) if any(s.startswith(self.text[i:]) for s in self.stops)
        ]
        return self.upto(min(starts, default=len(self.text)))

    def upto(self, end):
        piece, self.shown = self.text[self.shown : end], max(end, self.shown)
        return piece

    def close(self):
        return "" if self.done else self.upto(len(self.text))
