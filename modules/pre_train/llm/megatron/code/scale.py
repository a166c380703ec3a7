"""How a large model would scale, predicted from the formulas of this module and stated speeds. Nothing is measured.

    step = compute · (1 + bubble) + tensor-parallel and pipeline traffic + what of data parallelism no compute hides

Compute: 6 FLOPs a parameter and token, and attention's 6 · layers · width · length with causality (arXiv:2204.02311,
appendix B), at a stated share of the peak. Traffic: `volume.of_step` in bf16, over NVLink within 8 GPUs and over the
network beyond. The data-parallel sum is hidden behind the backward pass, which is two thirds of the compute.
"""

from finetune.distributed import volume
from finetune.distributed.mesh import Layout
from finetune.distributed.schedules import ideal_bubble
from finetune.distributed.stage import shapes
from finetune.lm.llama import LlamaConfig

PEAK, SHARE = 989e12, 0.5  # bf16 FLOP/s of an H100 SXM (NVIDIA's data sheet), and the share that its products reach
NVLINK, NETWORK = 450e9, 50e9  # bytes a second of one GPU in one direction: NVLink 4; 400 Gb/s InfiniBand
ROWS, LENGTH = 1024, 4096  # the batch, whatever the number of GPUs: 4.2 million tokens
MODEL = LlamaConfig(32000, 8192, 80, 64, 8, 28672, LENGTH, tied=False)  # Llama 2 70B
CASE = "Llama 2 70B, 1,024 × 4,096 tokens a step, H100s"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
LAYOUTS = {"tp 8": (8, 1), "tp 8, pp 4": (8, 4), "tp 8, pp 8": (8, 8), "tp 32: across machines": (32, 1)}


def compute_seconds(gpus: int) -> float:
    multiplied = sum(shape.numel() for name, shape in shapes(MODEL).items() if name != "embed.weight")
    flops = 6 * multiplied + 6 * MODEL.layers * MODEL.dim * LENGTH
    return ROWS * LENGTH * flops / (gpus * PEAK * SHARE)


def step_seconds(gpus: int, tp: int, pp: int) -> float:
    """Seconds of a step with the rest of the GPUs data-parallel, micro-batches of one row, sharded optimizer states."""
    layout = Layout(tp=tp, pp=pp, dp=gpus // (tp * pp))
    compute = compute_seconds(gpus)
    sent = volume.of_step(MODEL, layout, 0, rows=ROWS, length=LENGTH, sequence=True, sharded=True, width=2)
    by_group = {name: sum(n for (_, group), n in sent.items() if group == name) for name in ("tp", "pp", "dp_cp")}
    inside = NVLINK if tp <= 8 else NETWORK
    exposed = by_group["tp"] / inside + by_group["pp"] / NETWORK
    hidden = max(0.0, by_group["dp_cp"] / NETWORK - compute * 2 / 3)
    return (compute + exposed) * (1 + ideal_bubble(pp, ROWS // layout.dp)) + hidden


def fits(gpus: int, tp: int, pp: int) -> bool:
    """Whether weights and gradients in bf16 and sharded AdamW states (12 bytes each) leave a quarter of 80 GB."""
    own = sum(shape.numel() for shape in shapes(MODEL).values()) / (tp * pp)
    return own * (4 + 12 * tp * pp / gpus) < 60e9


def predicted() -> dict[str, list[tuple[int, float]]]:
    """(GPUs, share of the throughput without traffic and idle time) of each layout, where it fits in memory."""
    return {
        name: [
            (n, compute_seconds(n) / step_seconds(n, tp, pp)) for n in GPUS if n % (tp * pp) == 0 and fits(n, tp, pp)
        ]
        for name, (tp, pp) in LAYOUTS.items()
    }
