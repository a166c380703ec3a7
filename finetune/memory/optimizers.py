"""What an optimizer keeps of each trained parameter: the registry that the formulas, the meters and the search read."""

from __future__ import annotations

from dataclasses import dataclass

LIKE = 0  # bytes of a momentum that has the dtype of what is updated: the master's, or else the parameter's


@dataclass(frozen=True)
class Optimizer:
    """`states`: (which numbers, bytes that each of them adds). The numbers are counted by finetune/memory/counts.py:

    trained    every trained parameter
    matrices   those in matrices of the blocks, or of their adapters
    others     the rest: tables of the vocabulary, norms, biases
    factors    for a matrix its rows and columns, for a vector its elements
    blocks     256 trained parameters
    """

    name: str
    keeps: str  # of a trained parameter
    states: tuple[tuple[str, int], ...]
    source: str

    def __str__(self) -> str:
        return self.summary

    @property
    def summary(self) -> str:
        return f"{self.name}: {self.keeps}"


OPTIMIZERS = {
    "adamw": Optimizer("AdamW", "two fp32 moments", (("trained", 8),), "arXiv:1711.05101"),
    "adamw_bf16": Optimizer("bf16 AdamW", "two bf16 moments", (("trained", 4),), "torch.optim.AdamW in bf16"),
    "adamw8bit": Optimizer(
        "8-bit AdamW", "two 8-bit moments, two fp32 maxima for 256", (("trained", 2), ("blocks", 8)), "arXiv:2110.02861"
    ),
    "sgd": Optimizer("SGD", "nothing", (), "torch.optim.SGD"),
    "sgd_momentum": Optimizer("SGD with momentum", "one number", (("trained", LIKE),), "torch.optim.SGD"),
    "muon": Optimizer(
        "Muon",
        "one momentum for the blocks' matrices, AdamW's two moments for the rest",
        (("matrices", LIKE), ("others", 8)),
        "arXiv:2502.16982",
    ),
    "adafactor": Optimizer(
        "Adafactor", "an fp32 number for each row and column, no momentum", (("factors", 4),), "arXiv:1804.04235"
    ),
    "none": Optimizer("inference", "no gradients, a cache of batch · seq tokens", (), ""),
}
