"""Does it matter who else is in the batch? In exact arithmetic it does not. Floating-point sums depend on their order,
and a library chooses the order by the shape of the product: with other company the same request gets other bits, and
now and then another token (He et al. 2025, "Defeating nondeterminism in LLM inference").

    batch-invariant: the bits of a row of x Wᵀ depend on this row and W only; one order of sums for 1 row and for 100

torch's products choose by shape. `ops.quantized_linear` does not, whatever the format: with packed weights the engine
can promise it (`batch_invariant=True`), and refuses where it cannot.
"""

import copy
from dataclasses import asdict
from typing import Any

from finetune.inference.drift import drift
from finetune.lm.llama import Llama
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab

COMPANY, PROMPTS, PROMPT, ANSWER = (2, 4, 8), 8, 24, 12  # requests at once; all requests; tokens


def measure(lab: Lab) -> dict[str, Any]:
    """By kind of product and number of requests at once: how their answers differ from those that they get alone."""
    prompts = [lab.reference[500 * i :][: PROMPT - i] for i in range(PROMPTS)]

    def found(model: Llama, promised: bool = False) -> list[dict[str, Any]]:
        def start() -> Any:
            return lab.engine(model, PROMPT + ANSWER, max(COMPANY), prefix_cache=False, batch_invariant=promised)

        return [asdict(one) for one in drift(start, prompts, ANSWER, COMPANY)]

    return {
        "torch fp32": found(lab.model),
        "torch bf16": found(copy.deepcopy(lab.model).bfloat16()),
        f"packed {lab.cfg.format}": found(lab.served(), promised=True),
    }


def judge(run: Run, found: dict[str, Any]) -> None:
    for name, parts in found.items():
        key = "packed" if name.startswith("packed") else name.replace(" ", "_")
        most = 0 if key == "packed" else None
        run.check(f"drift_{key}", max(part["largest"] for part in parts), at_most=most)
        run.check(f"changed_answers_{key}", max(part["answers"] for part in parts), at_most=most)
        run.check(f"same_bits_{key}", min(part["same_bits"] for part in parts), at_least=None if most is None else 1)


def picture(run: Run, found: dict[str, Any]) -> None:
    """invariance.png: changes of the log-probabilities by number of requests at once."""
    made, (left, right) = figure(11.5, 4.3, 1, 2)
    for (name, parts), color, marker in zip(found.items(), (plots.AMBER, plots.RED, plots.BLUE), "os^", strict=True):
        style: dict[str, Any] = {"color": color, "marker": marker, "label": name}
        left.plot([part["company"] for part in parts], [100 * part["same_bits"] for part in parts], **style)
        right.plot([part["company"] for part in parts], [part["largest"] for part in parts], **style)
    right.set_yscale("symlog", linthresh=1e-7)
    right.set_ylim(-2e-8, None)
    left.set_ylim(0, 104)
    for axes in (left, right):
        axes.set_xticks(COMPANY)
    left.legend(frameon=False, fontsize=9)
    plots.titled(left, "tokens with the same bits as alone", "requests at once", "% of the tokens")
    plots.titled(right, "largest change of a log-probability", "requests at once", "nats")
    save(made, run.dir / "invariance.png")
