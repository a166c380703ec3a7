from .data import Question
def named(q): return str(q.images[0]) if q.images else ""
def draw(*a): pass
