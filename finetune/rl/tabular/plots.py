"""Pictures of state values and policies on a grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.rl.tabular.mdp import MDP, Array, greedy_actions
from finetune.runs.plots import INK

SHIFT = {"↑": (0, -1), "→": (1, 0), "↓": (0, 1), "←": (-1, 0)}


def optimal_actions(mdp: MDP, V: Array, tie: float = 1e-6) -> Array:
    """(S, A): 1 for every greedy action under V*, so that a picture shows all that tie."""
    return greedy_actions(mdp, V, tie).astype(np.float64)


def value_map(
    axes: Any, mdp: MDP, V: Array, policy: Array | None = None, title: str = "", digits: int = 2, cmap: str = "YlGnBu"
) -> Any:
    """A heat map of V on a grid MDP, with the value and an arrow for each action that `policy` takes.

    ★ marks the terminal state that pays most, × the other ones; hatched cells cannot be entered.
    """
    from matplotlib.patches import Rectangle

    assert mdp.shape is not None
    rows, columns = mdp.shape
    apart = np.einsum("sat->st", mdp.P) * (1 - np.eye(len(V)))
    unreached = (apart.sum(0) == 0) & (mdp.start == 0) if mdp.start.max() == 1 else np.zeros(len(V), bool)
    hidden = mdp.terminal | unreached
    inside = V[~hidden]
    low, high = (inside.min(), inside.max()) if inside.size else (0.0, 1.0)
    shown = np.ma.masked_where(hidden, V).reshape(rows, columns)
    image = axes.imshow(shown, cmap=cmap, vmin=low, vmax=high if high > low else low + 1, aspect="equal")
    place, inches = axes.get_position(), axes.figure.get_size_inches()
    cell = min(place.width * inches[0] / columns, place.height * inches[1] / rows)
    text = f".{digits}f" if abs(inside).max(initial=0.0) >= 10.0**-digits else ".1e"  # or all would read 0.00
    size = float(np.clip(17 * cell, 5.5, 11))
    ending, arrows = _stars(mdp), []
    for s in range(len(V)):
        y, x = divmod(s, columns)
        if hidden[s]:
            face, hatch = ("#d5dbe1", None) if mdp.terminal[s] else ("#eef1f4", "////")
            box = Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor="#9fb3c8", linewidth=0, facecolor=face, hatch=hatch)
            axes.add_patch(box)
            if mdp.terminal[s]:
                axes.text(x, y, "★" if ending[s] else "×", ha="center", va="center", fontsize=size * 1.9,
                          color="#b7791f" if ending[s] else "#c53030", in_layout=False)  # fmt: skip
            continue
        bright = (V[s] - low) / (high - low or 1.0)
        color = "white" if bright > 0.6 else INK
        axes.text(x, y + (0.36 if policy is not None else 0), f"{V[s]:{text}}", ha="center", va="center",
                  fontsize=size * (0.78 if policy is not None else 1), color=color, in_layout=False)  # fmt: skip
        if policy is not None:
            taken = [SHIFT[a] for a, p in zip(mdp.actions, policy[s], strict=True) if p > 0 and a in SHIFT]
            arrows += [(x, y - 0.08, 0.32 * dx, 0.32 * dy, color) for dx, dy in taken]
    if arrows:
        px, py, dx, dy, colors = zip(*arrows, strict=True)
        axes.quiver(px, py, dx, dy, color=colors, angles="xy", scale_units="xy", scale=1, units="inches",
                    width=0.03 * min(1.0, cell), headwidth=4.5, headlength=5, headaxislength=4.5)  # fmt: skip
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(False, which="major")
    axes.grid(True, which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    return image


def _stars(mdp: MDP) -> Array:
    """The terminal states whose entry pays the most."""
    entry = np.where(mdp.P > 0, mdp.rewards, -np.inf)
    entry[mdp.terminal] = -np.inf
    paid = entry.max((0, 1))
    return mdp.terminal & (paid == paid[mdp.terminal].max(initial=-np.inf))
