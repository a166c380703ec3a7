"""A load curve, as serving people draw it. Requests arrive at random, whether or not the earlier ones are done (an open
loop, Poisson arrivals): a closed loop of clients that wait for their answer slows down with the server and hides its
queue.

    TTFT   time to first token: from arrival on, the wait in the queue included
    TPOT   time per output token after the first: (last − first) / (tokens − 1)
    goodput   answered requests a second that met both limits (Zhong et al. 2024, arXiv:2401.09670)

Rates are shares of the engine's own capacity, all requests at once. The clock is the sum of the steps' times: nobody
waits for the time in which the engine has nothing to do.
"""

from typing import Any

from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, percentile, seconds

SHARES, REQUESTS, SEQUENCES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), 64, 16  # of the capacity; at each rate; at once
PROMPT, ANSWER = 128, (4, 32)  # tokens: at most; at least and at most
LIMITS = {"ttft": 10, "tpot": 1.5}  # times the TPOT of a full batch


def measure(lab: Lab) -> dict[str, Any]:
    """TTFT and TPOT (seconds) of every request, by rate."""
    requests = [(q[:PROMPT], min(max(len(a), ANSWER[0]), ANSWER[1])) for q, a in lab.pairs[:REQUESTS]]

    def engine() -> Engine:
        return lab.engine(lab.served(), PROMPT + ANSWER[1], SEQUENCES, most_tokens=256, prefix_cache=False)

    twice = [open_loop(engine(), requests, [0.0] * len(requests)) for _ in range(2)]
    full = min(twice, key=lambda one: one["end"])  # the less disturbed one
    capacity = len(requests) / full["end"]
    found: dict[str, Any] = {"capacity": capacity, "step": plots.median(full["tpot"]), "rates": []}
    for share in SHARES:
        gaps = [plots.exponential(lab.run.generator("arrivals", share, i)) for i in range(len(requests))]
        arrivals = plots.running_sum([gap / (share * capacity) for gap in gaps])
        found["rates"].append({"share": share, **open_loop(engine(), requests, arrivals)})
    return found


def open_loop(engine: Engine, requests: list[tuple[list[int], int]], arrivals: list[float]) -> dict[str, Any]:
    """Serves each (prompt, tokens of the answer) from its time of arrival on: TTFT and TPOT of each; when all end."""
    now, waiting, times = 0.0, list(zip(arrivals, requests, strict=True)), dict[Sequence, list[float]]()
    while waiting or engine.busy:
        if not engine.busy:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            arrived, (prompt, tokens) = waiting.pop(0)
            times[engine.add(prompt, Sampling(), tokens)] = [arrived]
        now += seconds(engine.step)
        for sequence in engine.changed:
            times[sequence].append(now)
    return {
        "ttft": [first - arrived for arrived, first, *_ in times.values()],
        "tpot": [(rest[-1] - first) / len(rest) for _, first, *rest in times.values()],
        "end": now,
    }


def good(found: dict[str, Any], part: dict[str, Any]) -> float:
    """The share of a rate's requests within both limits."""
    met = [
        all(value <= LIMITS[name] * found["step"] for name, value in zip(LIMITS, pair, strict=True))
        for pair in zip(part["ttft"], part["tpot"], strict=True)
    ]
    return sum(met) / len(met)


def goodput(found: dict[str, Any], part: dict[str, Any]) -> float:
    """Requests within both limits, a second until the last is answered, as a share of the capacity."""
    return good(found, part) * len(part["ttft"]) / part["end"] / found["capacity"]


def judge(run: Run, found: dict[str, Any]) -> None:
    rows = []
    for part in found["rates"]:
        row = {"load": f"{part['share']:.0%}"}
        for name in LIMITS:
            for share in (0.5, 0.95):
                times = percentile(part[name], share) / found["step"]
                row[f"{name.upper()} p{share:.0%}".rstrip("%")] = f"{times:.1f}"
        rows.append(row | {"within limits": f"{good(found, part):.0%}"})
    run.table("latency in steps of a full batch, by load", rows)
    low, high = found["rates"][0], found["rates"][-1]
    run.check("load_good_at_low_rate", good(found, low), at_least=0.9)
    run.check("load_ttft_growth", percentile(high["ttft"], 0.95) / percentile(low["ttft"], 0.95))
    run.check("load_goodput", max(goodput(found, part) for part in found["rates"]))


def picture(run: Run, found: dict[str, Any]) -> None:
    """load.png: TTFT and TPOT by rate, and goodput."""
    made, panels = figure(14, 4.3, 1, 3)
    x = [part["share"] for part in found["rates"]]
    for axes, name, title in zip(panels, LIMITS, ("time to first token", "time per output token"), strict=False):
        for share, color in ((0.5, plots.BLUE), (0.95, plots.RED)):
            y = [1e3 * percentile(part[name], share) for part in found["rates"]]
            axes.plot(x, y, "o-", color=color, label=f"p{100 * share:.0f}")
        limit = 1e3 * LIMITS[name] * found["step"]
        axes.axhline(limit, color=plots.GREY, linestyle="--", label=f"limit, {LIMITS[name]} steps of a full batch")
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=9)
        plots.titled(axes, f"{title} ({name.upper()})", "load, share of the capacity", "milliseconds")
    last = panels[2]
    last.plot(x, x, "--", color=plots.GREY, label="all that arrive")
    last.plot(x, [goodput(found, part) for part in found["rates"]], "o-", color=plots.GREEN, label="goodput")
    last.set_ylim(0, None)
    last.legend(frameon=False, fontsize=9)
    plots.titled(last, "answered within both limits", "load, share of the capacity", "share of the capacity")
    save(made, run.dir / "load.png")
