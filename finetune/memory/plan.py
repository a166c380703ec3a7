"""The memory of a training that is not a language model's: a module's own terms, by formula and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune.memory.setup import Term


@dataclass(frozen=True)
class Plan:
    """What `memory_plan` of a module gives whose network is none of `Shape`'s. `measure()` builds the network, takes a
    training step and returns bytes by the terms' names."""

    what: str  # the network and its batch in words
    parameters: int
    terms: tuple[Term, ...]
    measure: Callable[[], dict[str, int]]
    letters: dict[str, tuple[int, str]] = field(default_factory=dict)  # of the formulas: value and meaning
    parts: tuple[Term, ...] = ()  # of the activations of one image

    @property
    def peak(self) -> Term:
        """At most: activations leave while gradients come, so that not all of both are there at once."""
        names = " + ".join(term.name for term in self.terms)
        return Term("peak", sum(term.bytes for term in self.terms), names, "at most")

    def rows(self) -> list[dict[str, Any]]:
        """Predicted and measured bytes of each term, as `show.show_rows` takes them."""
        found = self.measure()
        return [
            {
                "name": f"training: {term.name}",
                "predicted": term.bytes,
                "measured": found[term.name],
                "simulated": False,
            }
            for term in self.terms
        ]


def states(parameters: int, buffers: int = 0, element: int = 4) -> Iterable[Term]:
    """What stays while a network of this many parameters is trained by AdamW and averaged (EMA), and its gradients:
    `element` bytes a number, moments and average in fp32, of 16-bit weights also a master copy."""
    kept, text = (8, "8·P") if element == 4 else (12, "12·P")
    weights = f"{element}·{'(P + b)' if buffers else 'P'}"
    yield Term("weights", (parameters + buffers) * element, weights, "")
    yield Term("gradients", parameters * element, f"{element}·P", "")
    yield Term("optimizer states", parameters * kept, text, "two moments" + ("" if element == 4 else ", master copy"))
    yield Term("EMA", 4 * parameters, "4·P", "")
