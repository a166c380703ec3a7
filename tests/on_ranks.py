"""What the tests of finetune/distributed run on ranks: functions that another process imports by name."""

import os
import signal
import time

import torch
from torch import nn

from finetune.distributed import schedules, sharded, tensor_parallel, volume
from finetune.distributed.collectives import MAX
from finetune.distributed.mesh import Layout, share
from finetune.distributed.model import ParallelModel
from finetune.distributed.pipeline import Work, play
from finetune.distributed.random import Streams
from finetune.distributed.stage import initial
from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.llama import Llama, LlamaConfig


def number(rank, add=0):
    print(f"rank {rank.number} of {rank.world}")
    return rank.number + add


def store_port(rank):
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set("who", f"{os.getppid()}")
    return store.get("who")


def refuse(rank):
    raise UserError("6 heads are refused")


def refuse_on_one(rank):
    if rank.number == 1:
        raise UserError("rank 1 alone refuses")
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(3))


def fail_on_one(rank):
    if rank.number == 1:
        raise ZeroDivisionError("a mistake in the code")
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(3))


def die_in_a_collective(rank, victim):
    group = rank.mesh(Layout(dp=rank.world)).dp
    group.all_reduce(torch.ones(7, 2))
    if rank.number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        group.all_reduce(torch.ones(5))


def different_shapes(rank):
    rank.mesh(Layout(tp=rank.world)).tp.all_reduce(torch.ones(4 + rank.number))


def different_order(rank):
    group = rank.mesh(Layout(tp=rank.world)).tp
    x = torch.ones(4)
    calls = [lambda: group.all_reduce(x), lambda: group.all_gather(x)]
    for call in calls if rank.number == 0 else calls[::-1]:
        call()


def other_group(rank):
    """Rank 0 waits in tp for a rank that never comes."""
    mesh = rank.mesh(Layout(tp=rank.world))
    if rank.number == 0:
        mesh.tp.all_reduce(torch.ones(2, 3))
    else:
        time.sleep(60)


def pids(rank):
    return os.getpid()


def sleep(rank, seconds):
    time.sleep(seconds)


def every_collective(rank):
    """The results of each collective on small numbers, and what was counted."""
    mesh = rank.mesh(Layout(tp=rank.world))
    group, r, n = mesh.tp, rank.number, rank.world
    x = torch.arange(2.0 * n).view(2, n) + 10 * r
    found = {
        "sum": group.all_reduce(x.clone()),
        "max": group.all_reduce(x.clone(), MAX),
        "gathered": group.all_gather(x, 1),
        "scattered": group.reduce_scatter(x, 1),
        "sent": group.all_to_all(x.T.contiguous(), [1] * n, [1] * n),
        "from": group.broadcast(x.clone(), n - 1),
    }
    pending = group.send(x, (r + 1) % n, tag=3)
    found["received"] = group.receive(torch.empty_like(x), (r - 1) % n, tag=3)
    pending.wait()
    flat, out = torch.arange(1.0 * n) + r, torch.empty(1)
    works = [group.start_reduce_scatter(out, flat), group.start_all_reduce(y := torch.ones(3) * r)]
    for work in works:
        work.wait()
    found |= {"started scatter": out, "started sum": y}
    return found, dict(mesh.counts.calls), dict(mesh.counts.bytes)


def places(rank, layout):
    mesh = rank.mesh(layout)
    groups = ("tp", "pp", "dp", "cp", "ep", "edp", "dp_cp", "edp_cp", "model", "ends")
    for name in groups:
        group = getattr(mesh, name)
        total = group.all_reduce(torch.tensor([float(rank.number)]))
        assert total.item() == sum(group.ranks)
    return mesh.place, {name: getattr(mesh, name).ranks for name in groups}


# --- A model on several ranks


GPT_SHAPE = {"vocab_size": 37, "dim": 24, "layers": 4, "heads": 6, "max_length": 16}
LLAMA_SHAPE = {"vocab_size": 37, "dim": 24, "layers": 4, "heads": 8, "kv_heads": 4, "hidden": 45, "max_length": 16}
UNTIED = LLAMA_SHAPE | {"tied": False, "qk_norm": True, "qkv_bias": True, "o_bias": True, "heads": 6, "kv_heads": 3}


def config_of(name):
    if name == "gpt":
        return GPTConfig(**GPT_SHAPE)
    if name == "capped":
        return LlamaConfig(**LLAMA_SHAPE, logit_softcap=5.0, attention_softcap=9.0, post_norms=True, head_dim=4)
    return LlamaConfig(**(UNTIED if name == "untied" else LLAMA_SHAPE), head_dim=4)


def whole_model(name):
    """One process's model, whose weights are far from their usual small ones."""
    torch.manual_seed(0)
    config = config_of(name)
    model = GPT(config) if name == "gpt" else Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def batch_of(rows=5, length=16, ignored=0.2, seed=1):
    """(rows, length + 1) tokens; the last ones of some rows, and all of the last row, are −100."""
    g = torch.Generator().manual_seed(seed)
    batch = torch.randint(37, (rows, length + 1), generator=g)
    for i in range(rows):
        if ignored and i % 2:
            batch[i, length - 2 * i :] = -100
    if ignored:
        batch[-1, 1:] = -100
    return batch


def assembled(pieces):
    """Whole tensors from the pieces of all ranks; NaN where no rank has one. Ranks that share a piece must agree."""
    whole = {}
    for name, piece, tensor in pieces:
        there = whole.setdefault(name, torch.full(piece.shape, torch.nan))
        mine = there.clone()
        piece.put(mine, tensor)
        torch.testing.assert_close(torch.where(there.isnan(), mine, there), mine, rtol=1e-5, atol=1e-7, equal_nan=True)
        piece.put(there, tensor)
    return whole


def made(rank, name, layout, **options):
    model = ParallelModel(config_of(name), rank.mesh(layout), length=options.pop("length", 16), **options)
    model.load(dict(whole_model(name).named_parameters()).__getitem__)
    return model


def gradients(rank, name, layout, rows, **options):
    """The loss, the norm, every parameter's gradient with its piece, and the micro-batches held."""
    model = made(rank, name, layout, **options)
    if options.get("sharded"):
        model.make_optimizer()
    loss = model.gradients(rows)
    norm = model.norm()
    if options.get("sharded"):  # the shards of the ranks of dp and cp together are the gradient
        for buckets in model.buckets:
            for bucket in buckets.buckets:
                bucket.flat.copy_(bucket.group.all_gather(bucket.shard.clone()))
    grads = [(name, piece, p.grad.clone()) for name, p, piece in model.named()]
    return loss, norm, grads, model.played.live


def trained(rank, name, layout, steps, **options):
    """Losses of some steps on changing rows, and the weights after them."""
    model = made(rank, name, layout, **options)
    model.make_optimizer(weight_decay=0.1)
    losses = []
    for step in range(steps):
        losses.append(model.gradients(batch_of(rows=6, seed=step)))
        model.step(lr=1e-2, clip=0.5)
    return losses, [(name, piece, p.detach().clone()) for name, p, piece in model.named()]


def counted(rank, name, layout, rows, **options):
    """Calls and bytes of one step's gradients, by (kind, group), and the buckets that started early."""
    model = made(rank, name, layout, **options)
    mesh = model.mesh
    mesh.counts.clear()
    model.gradients(rows)
    early = [buckets.early for buckets in model.buckets]
    return dict(mesh.counts.calls), dict(mesh.counts.bytes), early, [len(b.buckets) for b in model.buckets]


def evaluated(rank, name, layout, rows, **options):
    return made(rank, name, layout, **options).loss(rows)


def refused(rank, changes, layout, **options):
    config = GPTConfig(**(GPT_SHAPE | changes))
    ParallelModel(config, rank.mesh(layout), **({"length": 16} | options))


def drawn(rank, name, layout):
    """The pieces of the initial weights."""
    model = ParallelModel(config_of(name), rank.mesh(layout), length=16)
    model.load(initial(config_of(name), seed=3))
    return [(name, piece, p.detach().clone()) for name, p, piece in model.named()]


# --- Layers on two ranks, next to megatron-core and torch


def layers(rank, x, weight, bias, down):
    """Column- then row-parallel layers, with and without sequence parallelism: output and gradients."""
    tp = rank.mesh(Layout(tp=rank.world)).tp
    found = {}
    for sequence in (False, True):
        first, second = nn.Linear(*weight.shape[::-1]), nn.Linear(*down.shape[::-1], bias=False)
        first.weight.data, first.bias.data, second.weight.data = weight, bias, down
        column = tensor_parallel.split(first, tp, "column", sequence=sequence)
        row = tensor_parallel.split(second, tp, "row", sequence=sequence)
        own = tensor_parallel.own_part(x, tp) if sequence else x
        own = own.clone().requires_grad_()
        y = row(torch.tanh(column(own)))
        y.square().sum().backward()
        found[sequence] = y.detach(), own.grad, column.weight.grad, column.bias.grad, row.weight.grad
    joined = tensor_parallel.split(first, tp, "column", joined=True)
    own = x.clone().requires_grad_()
    y = joined(own)
    y.square().sum().backward()
    return found, (y.detach(), own.grad, joined.weight.grad)


def cross_entropies(rank, logits, targets):
    """Our loss and gradient on this rank's columns."""
    tp = rank.mesh(Layout(tp=rank.world)).tp
    start, stop = share(logits.shape[1], tp.size, tp.rank)
    own = logits[:, start:stop].clone().requires_grad_()
    rank.mesh(Layout(tp=rank.world))  # counts from here
    loss = tensor_parallel.vocabulary_parallel_cross_entropy(own, targets, start, tp)
    calls = dict(tp.counts.calls)
    (loss * torch.arange(1.0, len(loss) + 1)).sum().backward()
    return loss.detach(), own.grad, calls


def embeddings(rank, weight, tokens):
    tp = rank.mesh(Layout(tp=rank.world)).tp
    start, stop = share(len(weight), tp.size, tp.rank)
    found = []
    for sequence in (False, True):
        layer = tensor_parallel.VocabularyParallel(weight[start:stop].clone(), start, tp, sequence=sequence)
        x = layer(tokens)
        x.square().sum().backward()
        found.append((x.detach(), layer.weight.grad))
    return found


def megatron_layers(rank, x, weight, bias, down):
    """The same of megatron-core's layers."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    start_megatron(rank, parallel_state)
    config = ModelParallelConfig(
        tensor_model_parallel_size=rank.world, use_cpu_initialization=True, params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    options = {"config": config, "init_method": torch.nn.init.zeros_, "skip_bias_add": False}
    column = ColumnParallelLinear(weight.shape[1], weight.shape[0], gather_output=False, **options)
    row = RowParallelLinear(down.shape[1], down.shape[0], input_is_parallel=True, bias=False, **options)
    with torch.no_grad():
        column.weight.copy_(weight.chunk(rank.world)[rank.number])
        column.bias.copy_(bias.chunk(rank.world)[rank.number])
        row.weight.copy_(down.chunk(rank.world, 1)[rank.number])
    own = x.clone().requires_grad_()
    y = row(torch.tanh(column(own)[0]))[0]
    y.square().sum().backward()
    return y.detach(), own.grad, column.weight.grad, column.bias.grad, row.weight.grad


def megatron_cross_entropy(rank, logits, targets):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    start_megatron(rank, parallel_state)
    own = logits.chunk(rank.world, 1)[rank.number].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own.clone(), targets)
    (loss * torch.arange(1.0, len(loss) + 1)).sum().backward()
    return loss.detach(), own.grad


def start_megatron(rank, parallel_state):
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=rank.world)


def torch_layers(rank, x, weight, bias, down):
    """The same by torch's parallelize_module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(*weight.shape[::-1]), nn.Tanh(), nn.Linear(*down.shape[::-1], bias=False))
    model[0].weight.data, model[0].bias.data, model[2].weight.data = weight.clone(), bias.clone(), down.clone()
    mesh = init_device_mesh("cpu", (rank.world,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    own = x.clone().requires_grad_()
    y = model(own)
    y.square().sum().backward()
    grads = [p.grad.to_local() for p in (model[0].weight, model[0].bias, model[2].weight)]
    return y.detach(), own.grad, *grads


# --- Pipelines


def blocks(stages):
    """One small layer for each stage, the same on every rank."""
    g = torch.Generator().manual_seed(5)
    made = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(stages)]
    for layer in made:
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=g)
    return made


def square(y, target):
    return (y - target).square().sum()


def played(rank, x, target, micro, schedule, chunks=1):
    """Gradients and loss of this stage's layers by our executor."""
    pp = rank.mesh(Layout(pp=rank.world)).pp
    mine = blocks(pp.size * chunks)[pp.rank :: pp.size]
    xs, targets = x.tensor_split(micro), target.tensor_split(micro)

    def forward(chunk, m, given):
        y = mine[chunk](xs[m] if given is None else given)
        return square(y, targets[m]) if pp.last and chunk == chunks - 1 else y

    order = schedules.steps(schedule, pp.size, micro, pp.rank, chunks)
    result = play(order, pp, Work(forward, lambda chunk, m: xs[m].shape), chunks)
    grads = [[p.grad for p in layer.parameters()] for layer in mine]
    return grads, sum(result.losses.values()), [str(event.step) for event in result.trace], result.live


def torch_pipeline(rank, x, target, micro):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    layer = blocks(rank.world)[rank.number]
    stage = PipelineStage(layer, rank.number, rank.world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micro, loss_fn=square, scale_grads=False)
    if rank.number == 0:
        schedule.step(x)
    else:
        schedule.step(target=target) if rank.number == rank.world - 1 else schedule.step()
    return [p.grad for p in layer.parameters()]


def slept(rank, schedule, micro, chunks, forward, backward):
    """Events of a pipeline whose stages sleep where they would compute."""
    pp = rank.mesh(Layout(pp=rank.world)).pp

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(forward)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            time.sleep(backward)
            return dy

    def run(chunk, m, x):
        y = Sleep.apply(torch.ones(1, requires_grad=True) if x is None else x)
        return y.sum() if pp.last and chunk == chunks - 1 else y

    pp.barrier()
    order = schedules.steps(schedule, pp.size, micro, pp.rank, chunks)
    return play(order, pp, Work(run, lambda chunk, m: [1]), chunks).trace


# --- Sharded checkpoints


def steps_of(model, numbers):
    losses = []
    for number in numbers:
        losses.append(model.gradients(batch_of(rows=6, seed=number)))
        model.step(lr=1e-2, clip=0.5)
    return losses


def saved(rank, name, layout, folder, **options):
    """Two steps, a checkpoint, then the losses of two more."""
    model = made(rank, name, layout, **options)
    model.make_optimizer()
    steps_of(model, range(2))
    sharded.save(model, folder, rank.number, rank.world)
    return steps_of(model, range(2, 4))


def resumed(rank, name, layout, folder, **options):
    """The losses of the two steps after the checkpoint, from other weights on."""
    model = ParallelModel(config_of(name), rank.mesh(layout), length=16, **options)
    model.load(initial(config_of(name), 7))
    model.make_optimizer()
    sharded.load(model, folder)
    return steps_of(model, range(2, 4))


def predicted_and_sent(rank, name, layout, rows, **options):
    """Bytes of one step by formula, and as counted without the few numbers of loss and norm."""
    model = made(rank, name, layout, **options)
    model.make_optimizer()
    mesh = model.mesh
    mesh.counts.clear()
    model.gradients(rows)
    losses = {("all_reduce", name): volume.wire("all_reduce", getattr(mesh, name).size, 8) for name in ("dp_cp", "pp")}
    sent = {key: n - losses.get(key, 0) for key, n in mesh.counts.bytes.items()}
    mesh.counts.clear()
    if options.get("sharded"):
        model.optimizer.step(lr=0.0)
        sent |= mesh.counts.bytes
    options = {key: options[key] for key in ("chunks", "sequence", "sharded") if key in options}
    formula = volume.of_step(config_of(name), layout, rank.number, rows=len(rows), length=16, **options)
    return dict(formula), {key: n for key, n in sent.items() if n}


def loss_of_checkpoint(rank, name, layout, folder, rows):
    model = ParallelModel(config_of(name), rank.mesh(layout), length=16)
    sharded.load(model, folder)
    return model.loss(rows)


# --- Dropout and recomputation


def dropped(rank, layout, rows, **options):
    """Gradients with dropout, and the bytes that selective recomputation did not keep."""
    model = made(rank, "gpt", layout, dropout=0.3, seed=11, **options)
    loss = model.gradients(rows, step=4)
    saved = sum(getattr(stage.selective, "dropped", 0) for stage in model.stages)
    return loss, [(name, piece, p.grad.clone()) for name, p, piece in model.named()], saved, model.loss(rows)


def masks(rank, layout):
    streams = Streams(layout, rank.number, 5)
    x = torch.ones(1000)
    streams.restart(3)
    found = {name: streams.dropout(x, 0.25, name) for name in ("whole", "split")}
    streams.restart(3)
    before = streams.states()
    second = streams.dropout(x, 0.25, "whole")
    with streams.again(before):
        third = streams.dropout(x, 0.25, "whole")
    fourth = streams.dropout(x, 0.25, "whole")
    return found, second, third, fourth


# --- Experts


def routed(rank, name, layout, rows, mixture, **options):
    """Loss, norm, gradients, bytes of the all-to-alls, balance losses and dropped choices."""
    config = config_of(name)
    model = ParallelModel(config, rank.mesh(layout), length=16, mixture=mixture, **options)
    weights = initial(config, 3, mixture.experts)
    model.load(lambda key: weights(key) * (6 if weights(key).dim() == 2 else 1))
    if options.get("sharded"):
        model.make_optimizer()
    model.mesh.counts.clear()
    loss = model.gradients(rows)
    calls, sent = (dict(c) for c in (model.mesh.counts.calls, model.mesh.counts.bytes))
    norm = model.norm()
    if options.get("sharded"):
        for buckets in model.buckets:
            for bucket in buckets.buckets:
                bucket.flat.copy_(bucket.group.all_gather(bucket.shard.clone()))
    grads = [(key, piece, p.grad.clone()) for key, p, piece in model.named()]
    mixtures = model.mixtures()
    balance = torch.stack([model.mesh.dp_cp.all_reduce(m.balance.detach().clone()) for m in mixtures])
    return loss, norm, grads, (calls, sent), balance, sum(m.dropped for m in mixtures)


def mixture_trained(rank, layout, folder, mixture, load=None, **options):
    """Two steps, a checkpoint; or the two steps after one."""
    config = config_of("gpt")
    model = ParallelModel(config, rank.mesh(layout), length=16, mixture=mixture, **options)
    model.load(initial(config, 3 if load is None else 4, mixture.experts))
    model.make_optimizer()
    if load is None:
        steps_of(model, range(2))
        sharded.save(model, folder, rank.number, rank.world)
    else:
        sharded.load(model, folder)
    return steps_of(model, range(2, 4))
