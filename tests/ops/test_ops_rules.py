"""What holds for every op, present and future, beyond values: derivatives of any order are right, tensors on several
devices are refused, what changes gradients never changes weights."""

import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

from finetune import ops
from finetune.kernels import emulator
from finetune.ops import _library, _triton
from finetune.ops._backends import wrong_device
from finetune.ops._check import cotangents, flat
from finetune.ops._samples import sparse

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*(reference runs it|torch.func|forward-mode|no backward pass)")


# --- derivatives


def small(name):
    """An op's smallest samples with gradients, without NaN, as float64 arguments."""
    fits = [
        s
        for s in ops.REGISTRY[name].samples()
        if not s.bench and s.grad and all(t.numel() and not t.isnan().any() for t in flat(s.args))
    ]
    return sorted(fits, key=lambda s: sum(t.numel() for t in flat(s.args)))[:4]


DIFFERENTIABLE = [name for name in ops.REGISTRY if small(name)]


def second_gradients(name, sample, backend, dtype):
    """Of Σ w · y and the squares of its gradients: what a gradient penalty asks for."""
    args = sample.cast(dtype)
    inputs = [args[i] for i in sample.grad]
    y = flat(ops.REGISTRY[name](*args, backend=backend, **sample.kwargs))
    value = sum((t * w.to(t.dtype)).sum() for t, w in zip(y, cotangents(y, torch.float32), strict=True))
    first = torch.autograd.grad(value, inputs, create_graph=True)
    penalty = value + sum(g.square().sum() for g in first)
    return torch.autograd.grad(penalty, inputs)


@pytest.mark.parametrize("backend", ["cpp", "emulated", "triton"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name, backend):
    if backend == "emulated":
        emulator.load("emulated")
    if backend == "triton":
        pytest.importorskip("triton")
    for sample in small(name) if backend == "cpp" else small(name)[:1]:
        want = second_gradients(name, sample, "reference", torch.float64)
        for mine, exact in zip(second_gradients(name, sample, backend, torch.float32), want, strict=True):
            assert torch.allclose(mine.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()) + 1e-5), (
                sample.name
            )


def test_second_derivatives_of_one_tensor_given_thrice():
    x = torch.randn(1, 5, 2, 8, requires_grad=True)

    def gradient(backend):
        y = ops.attention(x, x, x, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert torch.allclose(gradient("cpp"), gradient("reference"), rtol=1e-4, atol=1e-4)


def test_the_reference_says_that_it_runs(monkeypatch):
    monkeypatch.setattr(_library, "warned", set())
    x = torch.randn(3, requires_grad=True)
    with pytest.warns(UserWarning, match="gelu: its backward pass is recorded.*reference runs it"):
        torch.autograd.grad(ops.gelu(x).sum(), x, create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(ops.gelu(x).sum(), x, create_graph=True)
        torch.autograd.grad(ops.gelu(x).sum(), x)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_of_torch_func(name):
    """grad of grad, Hessian, jvp, vmap of grad: the values of the reference, or, forced upon a kernel, an error."""
    op, sample = ops.REGISTRY[name], small(name)[0]
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in sample.cast(torch.float32)]
    at = sample.grad[0]
    weights = cotangents(flat(op(*args, backend="reference", **sample.kwargs)), torch.float32)

    def value(backend):
        def f(x):
            y = flat(op(*args[:at], x, *args[at + 1 :], backend=backend, **sample.kwargs))
            return sum((t * w).sum() for t, w in zip(y, weights, strict=True))

        return f

    x = args[at]
    transforms = [
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x / 2])),
    ]
    transforms += [lambda f: torch.func.hessian(f)(x)] if x.numel() < 50 else []
    for transform in transforms:
        want = transform(value("reference"))
        assert torch.allclose(transform(value(None)), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(ops.BackendUnavailable, match="only the plain-torch reference"):
            transform(value("cpp"))


def test_forward_mode_tangents_are_not_dropped():
    x, tangent = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with forward_ad.dual_level():
        found = [ops.gelu(forward_ad.make_dual(x, tangent), backend=b) for b in (None, "reference")]
        mine, want = (forward_ad.unpack_dual(y).tangent for y in found)
    assert torch.equal(mine, want)


@pytest.mark.parametrize("name", ops.REGISTRY)
def test_a_result_requires_gradients_where_the_references_does(name):
    """An op without a formula must not drop a gradient that its definition has."""
    sample = (
        next(s for s in ops.REGISTRY[name].samples() if not s.bench and not s.mutates and flat(s.args))
        if any(not s.mutates for s in ops.REGISTRY[name].samples())
        else None
    )
    if sample is None:
        return  # it changes its arguments and returns nothing to differentiate
    floats = [i for i, t in enumerate(sample.args) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
    for i in floats:
        wanted = []
        for backend in (None, "reference"):
            args = [t.detach() if isinstance(t, torch.Tensor) else t for t in sample.cast(torch.float32)]
            args[i].requires_grad_()
            wanted.append([t.requires_grad for t in flat(ops.REGISTRY[name](*args, backend=backend, **sample.kwargs))])
        assert wanted[0] == wanted[1], i


def test_derivatives_are_registered_in_one_place():
    for path in (ROOT / "finetune/ops").glob("*.py"):
        if path.name != "_library.py":
            assert "register_autograd" not in path.read_text(), f"{path.name}: use Library.derivative"
            assert "register_fake" not in path.read_text(), f"{path.name}: use Library.fake"


# --- devices


def operators(library):
    names = [s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{library}::")]
    return [getattr(getattr(torch.ops, library), name).default for name in sorted(set(names))]


FILL = {"int": 1, "float": 1.0, "bool": False, "str": "", "Optional[bool]": None}


def arguments(operator, device):
    """Whatever fits its schema: the devices are looked at before all else."""
    tensor = torch.zeros(2, device=device)
    fill = FILL | {"Tensor": tensor, "Optional[Tensor]": tensor, "List[Tensor]": [tensor, tensor]}
    return [fill[str(a.type)] if a.name != "dtype" else torch.float32 for a in operator._schema.arguments]


def on_two_devices(operator):
    """Its arguments, with one tensor after another elsewhere."""
    args = arguments(operator, "cpu")
    if sum(len(t) if isinstance(t, list) else isinstance(t, torch.Tensor) for t in args) < 2:
        return
    elsewhere = torch.zeros(2, device="meta")
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            yield [*args[:i], elsewhere, *args[i + 1 :]]
        elif isinstance(arg, list):
            yield [*args[:i], [arg[0], elsewhere], *args[i + 1 :]]


SAME = "Expected all tensors to be on the same device, but found at least two devices, (cpu and meta|meta and cpu)!"
HERE = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def refused(library):
    tried = 0
    for operator in operators(library):
        for args in on_two_devices(operator):
            tried += 1
            if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Meta"):
                with pytest.raises(RuntimeError, match=SAME):  # the shape function
                    operator(*args)
            with pytest.raises(RuntimeError, match=SAME):  # the kernel's binding
                operator.redispatch(HERE, *args)
    return tried


def test_bindings_refuse_tensors_on_several_devices():
    assert refused("finetune") > 80


def test_emulated_bindings_refuse_tensors_on_several_devices():
    emulator.load("emulated")
    assert refused("finetune_emulated") > 80


def test_triton_launchers_refuse_tensors_on_several_devices():
    pytest.importorskip("triton")
    for op in ops.REGISTRY.values():
        assert _triton.load(op) is None
    assert refused("finetune_triton") > 80


def test_lengths_of_attention_may_be_on_the_cpu():
    q = torch.empty(2, 5, 2, 8, device="meta")
    for kwargs in ({"lengths": torch.tensor([5, 2])}, {"cu_seqlens": torch.tensor([0, 2, 5])}):
        given = (q[:1] if "cu_seqlens" in kwargs else q,) * 3
        _, arguments = ops.REGISTRY["attention"].overload("finetune", *given, **kwargs)
        assert torch.ops.finetune.attention(*arguments)[0].shape == given[0].shape


def test_two_gpus_are_two_devices():
    first, second = (SimpleNamespace(device=torch.device(f"cuda:{i}")) for i in range(2))
    assert "cuda:0 and cuda:1!" in wrong_device("cuda", first, second)


def test_every_kernel_is_registered_with_the_check():
    for path in (ROOT / "csrc/bindings").glob("*.cpp"):
        if path.name != "library.cpp":
            text = path.read_text()
            assert "FINETUNE_KERNEL(m, " in text, path
            text = re.sub(r'm\.impl\("llama_free", TORCH_BOX\(&llama_free\)\);', "", text)  # it takes no tensor
            assert not re.search(r"\bimpl\(|TORCH_BOX", text), f"{path.name}: use FINETUNE_KERNEL"


def test_index_tensors_of_another_dtype_or_shape_are_refused():
    x, table = torch.randn(1, 2, 1, 4), torch.ones(3, 2)
    for positions in (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="positions must be"):
            torch.ops.finetune.rope(x, table, table, positions)
    own = torch.ops.finetune
    x, rstd = torch.randn(3, 4), torch.ones(3)
    for wrong in (rstd.double(), rstd[:2], torch.ones(6)[::2]):
        with pytest.raises(RuntimeError, match=r"float32|those of x|contiguous"):
            own.rms_norm_backward(x, x, torch.ones(4), wrong, True)
    with pytest.raises(RuntimeError, match="shape and dtype"):
        own.gelu_backward(x[:2], x)
    stats = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="outside the vocabulary of 4"):
        own.token_logprobs_backward(rstd, None, x, torch.tensor([0, 9, 1]), rstd, stats, 1.0, -100)


def test_indices_are_not_wrapped_or_truncated():
    cache, lengths = torch.randn(4, 2, 1, 8), torch.tensor([2])
    for table in (torch.tensor([[2**32 + 1]]), torch.tensor([[-(2**32) + 1]])):
        with pytest.raises(RuntimeError, match="a block outside of the cache"):
            ops.kv_cache_gather(cache, table, lengths, backend="cpp")
        with pytest.raises(RuntimeError, match="a block outside of the cache"):
            ops.paged_attention(torch.randn(1, 1, 8), cache, cache, table, lengths, backend="cpp")
    table, x = torch.tensor([[1]]), torch.randn(2, 1, 8)
    with pytest.raises(TypeError, match="table must be integers, got float32"):
        ops.paged_attention(torch.randn(1, 1, 8), cache, cache, table.float(), lengths, backend="cpp")
    with pytest.raises(TypeError, match="lengths must be integers, got float32"):
        ops.kv_cache_gather(cache, table, lengths + 0.5, backend="cpp")
    with pytest.raises(TypeError, match="slots must be integers"):
        ops.kv_cache_append_(x, x, cache, cache.clone(), torch.tensor([0.7, 1.9]), backend="cpp")
    with pytest.raises(TypeError, match="pairs must be integers"):
        ops.kv_cache_copy_([cache], torch.tensor([[0.0, 1.0]]), backend="cpp")


# --- lists


def trained():
    layer = torch.nn.Linear(3, 3)
    (100 * layer(torch.ones(1, 3)).sum()).backward()
    return layer


def test_clipping_parameters_clips_their_gradients():
    mine, theirs = trained(), trained()
    theirs.load_state_dict(mine.state_dict())
    before = [p.detach().clone() for p in mine.parameters()]
    mine.bias.requires_grad_(False)  # a frozen parameter is one too
    for given in (mine.parameters(), list(mine.parameters()), mine.weight):
        mine.weight.grad, mine.bias.grad = torch.full((3, 3), 7.0), None
        theirs.weight.grad, theirs.bias.grad = torch.full((3, 3), 7.0), None
        norm = ops.clip_grad_norm_(given, 0.5)
        assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        assert torch.allclose(mine.weight.grad, theirs.weight.grad)
        assert all(map(torch.equal, mine.parameters(), before))
    found, _ = ops.unscale_check_finite_(mine.parameters(), torch.tensor(2.0))
    assert not found
    assert torch.allclose(mine.weight.grad, 2 * theirs.weight.grad)
    assert all(map(torch.equal, mine.parameters(), before))


def test_lists_that_mix_or_hold_no_gradients_are_refused():
    layer = trained()
    plain = torch.ones(3)
    with pytest.raises(ValueError, match="item 0 is a parameter and item 1 is not"):
        ops.clip_grad_norm_([layer.weight, plain], 1.0)
    with pytest.raises(TypeError, match=r"grads\[1\] is NoneType, not a tensor: omit"):
        ops.clip_grad_norm_([plain, None], 1.0)
    with pytest.raises(TypeError, match=r"grads\[0\] is float"):
        ops.clip_grad_norm_([1.0], 1.0)
    with pytest.raises(ValueError, match="dense gradients"):
        ops.clip_grad_norm_([torch.ones(3).to_sparse()], 1.0)
    for bad in (-1.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"max_norm=.* must be 0 or more"):
            ops.clip_grad_norm_([plain], bad)
    assert torch.equal(plain, torch.ones(3))
    ops.clip_grad_norm_([plain], math.inf)
    assert torch.equal(plain, torch.ones(3))
    ops.clip_grad_norm_([plain], 0.0)
    assert not plain.any()


def test_gradients_with_a_graph_are_gradients():
    w = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    ops.clip_grad_norm_([g], 1.0)
    assert g.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("name", ["adamw_", "adamw8bit_"])
def test_optimizer_steps_read_generators_once_and_take_no_parameters_for_gradients(name):
    from finetune.ops.adamw8bit import states_like

    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    layer = trained()
    params = list(layer.parameters())

    def states():
        if name == "adamw_":
            return [[torch.zeros_like(p) for p in params] for _ in range(2)]
        return [[states_like(p)[key] for p in params] for key in states_like(params[0])]

    step = getattr(ops, name)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"grads\[0\] is a parameter: give its .grad"):
        step(params, params, *states(), **hyper)
    with pytest.raises(ValueError, match="grads has 1 tensors for 2 params"):
        step(params, [params[0].grad], *states(), **hyper)
    assert all(map(torch.equal, params, before))
    step((p for p in params), (p.grad for p in params), *(iter(s) for s in states()), **hyper)
    for p, old in zip(params, before, strict=True):
        assert torch.allclose(p, old - 0.1, atol=1e-5)


def test_the_norm_of_one_tensor_or_any_iterable():
    x = torch.tensor([3.0, 4.0])
    for given in (x, [x], iter([x]), (t for t in [x])):
        assert ops.global_norm(given) == 5


# --- addresses and indices that samples cannot have


@pytest.mark.parametrize("backend", ["cpp", "emulated", "triton"])
def test_linear_cross_entropy_reads_rows_beyond_2_to_the_32(backend):
    """Its inputs are contiguous, so it takes many rows; all but four of them are ignored."""
    if backend == "emulated":
        emulator.load("emulated")
    if backend == "triton":
        pytest.importorskip("triton")
    rows, dim, kept = 2**21 + 2, 2048, [0, 2**20, 2**21, 2**21 + 1]
    x = sparse(rows * dim, torch.bfloat16).view(rows, dim)
    assert kept[-1] * dim > 2**32
    x[kept] = torch.randn(4, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(7, dim, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    targets = torch.full((rows,), -100)
    targets[kept] = torch.tensor([1, 6, 0, 3])
    results = []
    for given in ((x, targets), (x[kept], targets[kept])):
        loss = ops.linear_cross_entropy(given[0], weight, given[1], backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_targets_outside_of_the_vocabulary_mark_their_row(backend):
    """Where the CPU raises, a GPU would have to be waited for: the row becomes NaN, and nothing else is lost."""
    if backend == "emulated":
        emulator.load("emulated")
    if backend == "triton":
        pytest.importorskip("triton")
    logits, targets = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 10, -100, 5])
    good = torch.tensor([True, True, False, True, True])
    for wrong in (11, -1, 2**40, -(2**40)):
        given = targets.masked_fill(~good, wrong)
        got = ops.token_logprobs(logits, given, entropy=True, backend=backend)
        want = ops.token_logprobs(logits[good], targets[good], entropy=True, backend="reference")
        for mine, theirs in zip(got, want, strict=True):
            assert mine[~good].isnan().all()
            assert torch.allclose(mine[good], theirs, atol=1e-6)
        with pytest.raises(RuntimeError, match=f"targets.2. is {wrong}, outside the vocabulary of 11"):
            ops.token_logprobs(logits, given, backend="cpp")
