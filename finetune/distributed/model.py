"""A model on a mesh: the stages of this rank, one step's gradients by a pipeline schedule, their norm, the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune import optim
from finetune.distributed import plan, schedules
from finetune.distributed.context_parallel import tokens_of
from finetune.distributed.data_parallel import BUCKET, Buckets
from finetune.distributed.distributed_optimizer import ShardedAdamW
from finetune.distributed.experts import Mixture, MixtureSettings
from finetune.distributed.mesh import Mesh, share
from finetune.distributed.pipeline import Played, Work, play
from finetune.distributed.random import Streams
from finetune.distributed.recompute import Recompute
from finetune.distributed.stage import Named, Source, Stage
from finetune.errors import UserError

IGNORED = -100


def is_expert(name: str) -> bool:
    """Whether a parameter is an expert's, which only the ranks of one place in ep have."""
    return ".experts." in name


class ParallelModel:
    """The project's GPT or Llama on the ranks of a mesh.

        model = ParallelModel(config, mesh)
        model.load(initial(config, seed))
        loss = model.gradients(rows)        # rows (B, T + 1) of the whole batch, the same on every rank
        norm = model.norm()
        model.step(lr, clip)

    schedule: that of the pipeline; chunks: of each stage, more than one for interleaved. sequence: sequence
    parallelism. dropout, recompute: see `Stage`; seed: of dropout. sharded: AdamW's states are shared out over dp · cp.
    A batch's loss is the sum over its tokens divided by their number, whichever rank has them: micro-batches, ranks and
    windows of unequal size count by tokens. mixture: experts in the place of every block's MLP.
    """

    def __init__(
        self,
        config: plan.Config,
        mesh: Mesh,
        *,
        length: int,
        micro: int = 1,
        schedule: schedules.Schedule = "1f1b",
        chunks: int = 1,
        sequence: bool = False,
        sharded: bool = False,
        bucket: int = BUCKET,
        dropout: float = 0.0,
        recompute: Recompute = "none",
        seed: int = 0,
        mixture: MixtureSettings | None = None,
    ) -> None:
        self.config, self.mesh, self.length, self.micro = config, mesh, length, micro
        stages = mesh.pp.size * chunks
        plan.check(config, mesh.tp.size, stages, mesh.cp.size, length, sequence)
        self.schedule = schedules.steps(schedule, mesh.pp.size, micro, mesh.pp.rank, chunks)
        self.sequence = sequence
        numbers = [chunk * mesh.pp.size + mesh.pp.rank for chunk in range(chunks)]
        if mixture is not None:
            mixture.check(mesh)
            if recompute == "selective":
                raise UserError("experts: selective recomputation is not supported; use block")
        elif mesh.ep.size > 1:
            raise UserError(f"ep {mesh.ep.size} needs experts")
        self.streams = Streams(mesh.layout, mesh.rank, seed)
        self.stages = [
            Stage(
                config,
                mesh,
                share(config.layers, stages, n),
                n == 0,
                n == stages - 1,
                sequence=sequence,
                dropout=dropout,
                recompute=recompute,
                streams=self.streams,
                mixture=mixture,
            )
            for n in numbers
        ]
        self.sharded = sharded
        self.shared = self.shared_parameters()
        late = list(self.shared.values())
        self.late = Buckets(late, mesh.dp_cp, size=bucket, overlapped=False, scattered=sharded)
        self.buckets = [self.late]
        for stage in self.stages:
            early = [p for name, p, _ in stage.named() if name not in self.shared and not is_expert(name)]
            self.buckets.append(Buckets(early, mesh.dp_cp, size=bucket, scattered=sharded))
            if experts := [p for name, p, _ in stage.named() if is_expert(name)]:
                self.buckets.append(Buckets(experts, mesh.edp_cp, size=bucket, scattered=sharded))
        self.optimizer: optim.AdamW | ShardedAdamW | None = None
        self.played: Played | None = None

    def named(self) -> Iterator[Named]:
        for stage in self.stages:
            yield from stage.named()

    def mixtures(self) -> list[Mixture]:
        return [module for stage in self.stages for module in stage.modules() if isinstance(module, Mixture)]

    def shared_parameters(self) -> dict[str, Any]:
        """By name the parameters whose gradients several ranks have shares of: of tp, where each sees a part of the
        sequence or of the heads; of a tied embedding, the first and the last stage."""
        ends = self.mesh.ends.size > 1
        tied = {"embed.weight"} if ends and self.stages[0].tied else set()
        return {name: p for name, p, piece in self.named() if piece.partial or name in tied}

    def load(self, source: Source) -> None:
        for stage in self.stages:
            stage.load(source)

    # --- One step

    def gradients(self, rows: Tensor, step: int = 0) -> float:
        """Leaves in `.grad` the gradient of the mean loss (nats a token) of rows (B, T + 1), and returns that loss;
        both as one process would have them. Rows may hold −100 behind the end of a text, targets that
        are not counted. step: of the run, on which dropout's numbers depend."""
        mesh = self.mesh
        tokens, targets, places = self.own_part(rows)
        total = max(int((rows[:, 1:] != IGNORED).sum()), 1)
        parts = list(zip(tokens.tensor_split(self.micro), targets.tensor_split(self.micro), strict=True))

        def forward(chunk: int, micro: int, x: Tensor | None) -> Tensor:
            stage, (some, wanted) = self.stages[chunk], parts[micro]
            y = stage(some, places.expand(len(some), -1), x)
            return stage.loss(y, wanted) / total if stage.last else y

        def shape(chunk: int, micro: int) -> Sequence[int]:
            return self.stages[chunk].output_shape(parts[micro][0])

        self.streams.restart(step)
        for mixture in self.mixtures():
            mixture.parts = self.micro
        for buckets in self.buckets:
            buckets.begin(self.micro)
        dtype = next(self.stages[0].parameters()).dtype
        self.played = play(self.schedule, mesh.pp, Work(forward, shape, dtype), len(self.stages))
        self.sum_shared()
        for buckets in self.buckets:
            buckets.finish()
        return self.summed(sum(self.played.losses.values(), torch.zeros(())))

    def own_part(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and targets (b, t) of this rank's rows and places, and those places (t,) of the row."""
        mesh, length = self.mesh, rows.shape[1] - 1
        plan.check(self.config, mesh.tp.size, 1, mesh.cp.size, length, self.sequence)
        own = rows[slice(*share(len(rows), mesh.dp.size, mesh.dp.rank))]
        places = tokens_of(length, mesh.cp.size, mesh.cp.rank)
        return own[:, :-1][:, places].clamp(min=0), own[:, 1:][:, places], places

    def summed(self, value: Tensor) -> float:
        """The sum over the ranks of dp and cp of what the last stage has, on every rank."""
        value = value.detach().double().reshape(1) if self.stages[-1].last else torch.zeros(1, dtype=torch.float64)
        return self.mesh.pp.all_reduce(self.mesh.dp_cp.all_reduce(value)).item()

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Sums the gradients of `shared_parameters`, before they are summed over dp and cp."""
        partial = [p.grad for _, p, piece in self.named() if piece.partial and p.grad is not None]
        if partial:
            flat = self.mesh.tp.all_reduce(torch.cat([g.flatten() for g in partial]))
            for g, total in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
                g.copy_(total.view_as(g))
        if self.mesh.ends.size > 1:
            for stage in self.stages:
                if stage.tied and stage.first != stage.last:
                    gradient = stage.model.embed.weight.grad
                    assert gradient is not None
                    self.mesh.ends.all_reduce(gradient)

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of the whole model's gradient: every parameter counted once, the same on every rank."""
        dense, experts = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        names = {p: name for name, p, _ in self.named()}
        for p, g, piece in self.owned_gradients():
            if piece.counted:
                total = experts if is_expert(names[p]) else dense
                total += g.double().square().sum()
        if self.sharded:
            self.mesh.dp_cp.all_reduce(dense)
            self.mesh.edp_cp.all_reduce(experts)
        return self.mesh.model.all_reduce(dense + self.mesh.ep.all_reduce(experts)).sqrt().item()

    def owned_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, plan.Piece]]:
        """(parameter, gradient or this rank's slice of it, piece)."""
        if not self.sharded:
            yield from ((p, p.grad, piece) for _, p, piece in self.named() if p.grad is not None)
            return
        assert isinstance(self.optimizer, ShardedAdamW)
        pieces = {p: piece for _, p, piece in self.named()}
        yield from ((s.parameter, s.own.grad, pieces[s.parameter]) for s in self.optimizer.slices)  # type: ignore[misc]

    def make_optimizer(self, weight_decay: float = 0.1, **settings: Any) -> None:
        """AdamW; matrices decay, vectors do not. With `sharded` its states are shared out."""
        if self.sharded:
            self.optimizer = ShardedAdamW(self.buckets, weight_decay, **settings)
        else:
            params = [p for _, p, _ in self.named()]
            self.optimizer = optim.AdamW(optim.decay_groups(params, weight_decay), **settings)

    def step(self, lr: float, clip: float) -> float:
        """Clips the gradient to the norm `clip` and updates; returns the norm before clipping."""
        if self.optimizer is None:
            raise UserError("make_optimizer first")
        norm = self.norm()
        self.optimizer.step(lr=lr, grad_scale=min(1.0, clip / (norm + 1e-6)))
        return norm

    # --- Without gradients

    @torch.no_grad()
    def loss(self, rows: Tensor) -> tuple[float, int]:
        """(nats summed over the targets of rows (B, T + 1), their number), over all ranks. Rows are shared out over dp
        and go through the stages one after the other."""
        mesh = self.mesh
        tokens, targets, places = self.own_part(rows)

        def forward(chunk: int, micro: int, x: Tensor | None) -> Tensor:
            y = self.stages[chunk](tokens, places.expand(len(tokens), -1), x)
            return self.stages[chunk].loss(y, targets) if self.stages[chunk].last else y

        def shape(chunk: int, micro: int) -> Sequence[int]:
            return self.stages[chunk].output_shape(tokens)

        order = [schedules.Step("F", 0, chunk) for chunk in range(len(self.stages))]
        dtype = next(self.stages[0].parameters()).dtype
        played = play(order, mesh.pp, Work(forward, shape, dtype), len(self.stages))
        return self.summed(sum(played.losses.values(), torch.zeros(()))), int((rows[:, 1:] != IGNORED).sum())
