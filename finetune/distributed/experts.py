"""A mixture of experts in the place of a block's MLP, its experts on several ranks (Shazeer et al. 2017,
arXiv:1701.06538; Lepikhin et al. 2020, arXiv:2006.16668; Fedus et al. 2021, arXiv:2101.03961).

    p = softmax(W x) over the experts;  each token goes to its k most likely ones, g = p of those, divided by their sum
    y = Σ_e g_e · MLP_e(x)                                       a token that an expert has no room for gets 0 from it
    balance = E · Σ_e (share of the choices that fell on e) · (mean of p_e)      at least 1, 1 where all are used alike

Tokens travel: sorted by expert, an all-to-all brings each to the rank that has its expert, another one back. Shares and
means are over all ranks that read other tokens (dp · cp), so that they do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.distributed.collectives import Group
from finetune.distributed.mesh import Mesh, share, sizes
from finetune.errors import UserError


class MixtureSettings(NamedTuple):
    """experts in all, of which a token goes to `top`. capacity: an expert takes at most capacity · top / experts of a
    rank's tokens of a micro-batch; 0: all that come. balance: weight of the balance loss."""

    experts: int
    top: int = 2
    capacity: float = 0.0
    balance: float = 0.01

    def check(self, mesh: Mesh) -> None:
        """UserError names the first setting that cannot be."""
        if not 1 <= self.top <= self.experts:
            raise UserError(f"a token cannot go to {self.top} of {self.experts} experts")
        if self.experts < mesh.ep.size:
            raise UserError(f"ep {mesh.ep.size} is too large: there are {self.experts} experts, each rank needs one")
        if mesh.tp.size > 1:
            raise UserError(f"experts: tp {mesh.tp.size} is not supported; use tp 1 and ep")


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return group.all_to_all(x, send, receive)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.group.all_to_all(dy.contiguous(), ctx.receive, ctx.send), None, None, None


class _WithLoss(torch.autograd.Function):
    """y, whose backward pass also descends `loss`, which is added to no other."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return dy, torch.ones((), dtype=ctx.dtype, device=ctx.device)


class Router(nn.Module):
    """Chooses experts. weight (E, C)."""

    def __init__(self, dim: int, settings: MixtureSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.experts, dim))
        self.top = settings.top

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C) → p (N, E) in fp32, gates (N, k), chosen experts (N, k)."""
        p = (x.float() @ self.weight.float().T).softmax(-1)
        gates, chosen = p.topk(self.top, -1)
        return p, gates / gates.sum(-1, keepdim=True), chosen


class Mixture(nn.Module):
    """Router and this rank's experts, made by `mlp`. balance: the balance loss of the latest pass; dropped: how many of
    its choices found no room."""

    def __init__(self, dim: int, mlp: Callable[[], nn.Module], settings: MixtureSettings, mesh: Mesh) -> None:
        super().__init__()
        settings.check(mesh)
        self.settings, self.mesh = settings, mesh
        self.router = Router(dim, settings)
        first, stop = share(settings.experts, mesh.ep.size, mesh.ep.rank)
        self.experts = nn.ModuleDict({str(e): mlp() for e in range(first, stop)})
        self.parts = 1  # micro-batches of a step, among which the balance loss is divided
        self.balance, self.dropped = torch.zeros(()), 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, C)
        p, gates, chosen = self.router(tokens)
        y = self.dispatched(tokens, gates, chosen).view_as(x)
        if not torch.is_grad_enabled():
            return y
        self.balance = self.balance_loss(p, chosen)
        return _WithLoss.apply(y, self.balance * (self.settings.balance / self.parts))

    def balance_loss(self, p: Tensor, chosen: Tensor) -> Tensor:
        """This rank's share of E · Σ_e f_e · P_e, f and P over all ranks of dp and cp."""
        count = chosen.flatten().bincount(minlength=self.settings.experts).double()
        everyone = self.mesh.dp_cp.all_reduce(torch.cat([count, count.new_tensor([len(p)])]))
        choices, total = everyone[:-1], everyone[-1].clamp(min=1)
        share_of = choices / (total * self.settings.top)
        return self.settings.experts * (share_of.to(p.dtype) * p.sum(0)).sum() / total.to(p.dtype)

    def dispatched(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Σ of gate · expert(x) of the chosen experts of each token (N, C)."""
        settings, ep = self.settings, self.mesh.ep
        order = chosen.flatten().argsort(stable=True)  # choices by expert, then by token
        expert = chosen.flatten()[order]
        if settings.capacity:
            room = -int(-settings.capacity * settings.top * len(x) // settings.experts)
            first = torch.searchsorted(expert, expert)  # where this expert's choices begin
            kept = torch.arange(len(expert)) - first < room
            self.dropped = int((~kept).sum())
            order, expert = order[kept], expert[kept]
        token = order // settings.top
        counts = expert.bincount(minlength=settings.experts)  # (E,)
        owners = sizes(settings.experts, ep.size)
        mine = len(self.experts)
        theirs = ep.all_to_all(counts, owners, [mine] * ep.size).view(ep.size, mine)  # from each rank, for each of mine
        send = [int(part.sum()) for part in counts.split(owners)]
        receive = theirs.sum(1).tolist()
        rows = _AllToAll.apply(x[token], send, receive, ep)  # by sender, then by expert
        of = torch.arange(mine).repeat(ep.size).repeat_interleave(theirs.flatten())  # the local expert of each row
        grouped = of.argsort(stable=True)
        parts = rows[grouped].split(theirs.sum(0).tolist())
        done = torch.cat([each(part) for each, part in zip(self.experts.values(), parts, strict=True)])
        back = _AllToAll.apply(torch.empty_like(done).index_copy(0, grouped, done), receive, send, ep)
        weighted = back * gates.flatten()[order].to(back.dtype)[:, None]
        return torch.zeros_like(x).index_add(0, token, weighted)
