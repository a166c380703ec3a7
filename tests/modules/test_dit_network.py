"""The network of dit next to the paper's and diffusers', its loss, its cost."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.diffusion import draw
from finetune.diffusion.process import Process
from finetune.errors import UserError
from finetune.memory import meters
from finetune.runs import registry

INFO = registry.find("dit")
main = registry.load(INFO)
model, loss, convert, cost = (registry.part("dit", name) for name in ("model", "loss", "convert", "cost"))


def shape(**changes):
    given = {"side": 12, "channels": 3, "patch": 2, "dim": 48, "layers": 3, "heads": 4, "classes": 10} | changes
    return model.DiTConfig(**given)


def awake(config, seed=0):
    """A DiT whose weights are all random: a fresh one predicts 0 whatever its input is."""
    torch.manual_seed(seed)
    net = model.DiT(config)
    for p in net.parameters():
        p.data.normal_(0, 0.1)
    return net


def inputs(config, rows=4):
    x = torch.randn(rows, config.channels, config.side, config.side)
    return x, torch.tensor([0, 5, 500, 999])[:rows], torch.tensor([0, 3, 9, config.classes])[:rows]


# --- The network as the paper's code has it


class PaperBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        b, n, dim = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        q, k, v = self.attn["qkv"](h).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(dim // self.heads)).softmax(-1)
        x = x + gate1[:, None] * self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, dim))
        h = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))


class Paper(nn.Module):
    """Peebles & Xie 2023 from the paper's text in plain torch, with the names of facebookresearch/DiT."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        n = c.side // c.patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(c.channels, c.dim, c.patch, c.patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(c.classes + 1, c.dim)})
        self.blocks = nn.ModuleList(PaperBlock(c.dim, c.heads) for _ in range(c.layers))
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 2 * c.dim)),
                "linear": nn.Linear(c.dim, c.patch**2 * c.outputs),
            }
        )
        table = torch.empty(n * n, c.dim)
        for row in range(n):
            for column in range(n):
                for half, place in ((0, column), (1, row)):  # w goes first
                    for i in range(c.dim // 4):
                        angle = place / 10000 ** (i / (c.dim // 4))
                        table[row * n + column, half * c.dim // 2 + i] = math.sin(angle)
                        table[row * n + column, half * c.dim // 2 + c.dim // 4 + i] = math.cos(angle)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)

    def forward(self, x, t, y):
        c, n = self.c, self.c.side // self.c.patch
        frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)])
        angles = t[:, None].float() * frequencies
        condition = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1))
        condition = condition + self.y_embedder["embedding_table"](y)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=1)
        h = F.layer_norm(h, (c.dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        h = self.final_layer["linear"](h).reshape(len(x), n, n, c.patch, c.patch, c.outputs)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), c.outputs, n * c.patch, n * c.patch)


def paper(config):
    torch.manual_seed(1)
    reference = Paper(config)
    for name, p in reference.named_parameters():
        if name != "pos_embed":
            p.data.normal_(0, 0.1)
    return reference


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_equals_the_paper(learn_sigma):
    config = shape(frequency_shift=0, learn_sigma=learn_sigma)
    reference = paper(config)
    ours = convert.from_paper(reference.state_dict(), config)
    given = inputs(config)
    want = reference(*given)
    assert want.abs().max() > 0.5
    assert (ours(*given) - want).abs().max() < 1e-5
    # Gradients of all weights, too.
    ours(*given).square().mean().backward()
    want.square().mean().backward()
    theirs = convert.from_paper({n: p.grad for n, p in reference.named_parameters() if p.grad is not None}, config)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(p.grad, q, rtol=1e-3, atol=1e-5 * float(q.detach().abs().max()) + 1e-7), name


@pytest.mark.peer
def test_diffusers_opens_the_model_and_computes_the_same(tmp_path):
    from diffusers import DiTTransformer2DModel

    for learn_sigma in (True, False):
        config = shape(learn_sigma=learn_sigma)
        ours = awake(config)
        convert.save(ours, tmp_path / str(learn_sigma))
        theirs = DiTTransformer2DModel.from_pretrained(tmp_path / str(learn_sigma)).eval()
        x, t, labels = inputs(config)
        with torch.no_grad():
            want = theirs(x, timestep=t, class_labels=labels).sample
            assert want.abs().max() > 0.5
            assert (ours(x, t, labels) - want).abs().max() < 1e-5
    # And the other way: a model that diffusers made and saved, of which only the time and label embedders must agree.
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=2, num_layers=2, sample_size=6, patch_size=3,
        num_embeds_ada_norm=7, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for p in theirs.parameters():
        p.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="block 1 has another"):
        convert.load(tmp_path / "theirs")
    first, second = (block.norm1.emb for block in theirs.transformer_blocks)
    second.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    mine = convert.load(tmp_path / "theirs")
    x, t, labels = torch.randn(3, 2, 6, 6), torch.tensor([1, 2, 900]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        assert (mine(x, t, labels) - theirs(x, timestep=t, class_labels=labels).sample).abs().max() < 1e-5


def test_saved_and_loaded_weights_are_the_same_bits(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        net = awake(shape(frequency_shift=0)).to(dtype)
        convert.save(net, tmp_path)
        again = convert.load(tmp_path)
        assert again.config == net.config
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_eps", 1e-5, "norm_eps is 1e-05; a DiT has 1e-06"),
        ("activation_fn", "geglu", "activation_fn is 'geglu'"),
        ("out_channels", 5, "out_channels is 5"),
        ("num_layers", 2, "num_layers is 2, the weights have 3 blocks"),
        ("num_layers", 2**31 - 1, "larger than any"),
        ("patch_size", 5, "patches of 5 do not divide images of 12×12"),
        ("sample_size", "big", "sample_size"),
    ],
)
def test_a_model_that_is_no_dit_is_refused_in_one_line(tmp_path, key, value, message):
    convert.save(awake(shape()), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=message) as caught:
        convert.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- Parts


def test_patches_are_those_of_a_convolution():
    config = shape()
    x = torch.randn(2, 3, 12, 12)
    weight = torch.randn(5, 3, 2, 2)
    want = F.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patchify(x, 2) @ weight.flatten(1).t(), want, atol=1e-5)
    # unpatchify: the pixel (p, q) of channel c of patch n is number (p · patch + q) · outputs + c of its row.
    patches = torch.randn(1, 36, 4 * config.outputs)
    image = model.unpatchify(patches, config)
    assert image[0, 4, 2 * 3 + 1, 2 * 5] == patches[0, 6 * 3 + 5, (1 * 2 + 0) * config.outputs + 4]


def test_every_block_begins_as_the_identity():
    torch.manual_seed(0)
    config = shape()
    net = model.DiT(config)
    x, condition = torch.randn(2, 36, 48), torch.randn(2, 48)
    for block in net.blocks:
        assert torch.equal(block(x, condition), x)
    assert not net(*inputs(config)).any()


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_loss_at_the_start(kind):
    """The network predicts 0, so the loss is the target's mean square: of ε it is 1."""
    torch.manual_seed(0)
    net, process = model.DiT(shape(side=8, channels=1)), Process(kind, "cosine")
    x0 = torch.rand(64, 1, 8, 8) * 2 - 1
    found = main.loss_at_start(net, process, x0, torch.zeros(64, dtype=torch.int64))
    power = 1.0 if kind == "eps" else float((process.bar + (1 - process.bar) * x0.square().mean()).mean())
    assert found == pytest.approx(power, abs=0.02)


def test_gradient_checkpointing_changes_no_bit():
    config = shape()
    net, given = awake(config), inputs(config)
    gradients = []
    for save_memory in (False, True):
        net.gradient_checkpointing = save_memory
        net.zero_grad()
        net(*given).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_bound_of_the_variance():
    """Its terms next to their definitions, and it falls to the known optimum: with the best variance for its error."""
    process = Process("eps", "cosine", 50)
    torch.manual_seed(0)
    x0, eps = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    t = torch.tensor([1, 2, 10, 30, 49, 0])
    x = process.add_noise(x0, eps, t)
    for spread in (-1.0, 0.3, 1.0):
        found = loss.variance_bound(process, x0, x, t, eps, torch.full_like(x0, spread))
        for k in range(5):  # the exact ε: both means agree, and only the variances differ
            bar, before = process.bar[t[k]], process.bar[t[k] - 1]
            beta = 1 - bar / before
            small = beta * (1 - before) / (1 - bar)
            variance = beta ** ((spread + 1) / 2) * small ** ((1 - spread) / 2)
            q, p = (
                torch.distributions.Normal(torch.zeros((), dtype=torch.float64), v.sqrt()) for v in (small, variance)
            )
            want = torch.distributions.kl_divergence(q, p) / math.log(2)
            assert float(found[k]) == pytest.approx(float(want), abs=1e-5)
    # The discretized likelihood is a distribution over 256 values.
    values = torch.arange(256) / 127.5 - 1
    mean, log_deviation = torch.tensor(0.2), torch.tensor(-2.0)
    assert loss.log_likelihood(values, mean, log_deviation).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_the_bound_teaches_the_variance_only():
    config = shape(side=8, channels=1)
    net, process = awake(config), Process("v", "cosine")
    x0 = torch.rand(4, 1, 8, 8) * 2 - 1
    _, bound = loss.denoising_loss(
        net, process, x0, torch.arange(4), torch.tensor([0, 5, 99, 700]), torch.randn_like(x0)
    )
    bound.backward()
    rows = net.head.weight.grad.reshape(4, 2, -1).abs().sum((0, 2))  # pixels of a patch, outputs
    assert rows[0] == 0
    assert rows[1] > 0


def test_guidance_of_the_papers_three_channels():
    """The rest, and the variance, are the conditional output's."""
    config = shape(channels=4)
    net, (x, _, labels) = awake(config), inputs(config)
    plain, given, guided = (draw.classifier_free(net, labels, w)(x, 7) for w in (0, 1, 3))
    quirk = draw.classifier_free(net, labels, 3, channels=3)(x, 7)
    assert torch.allclose(guided, plain + 3 * (given - plain), atol=1e-5)
    assert torch.allclose(quirk[:, :3], guided[:, :3], atol=1e-5)
    assert torch.allclose(quirk[:, 3:], given[:, 3:], atol=1e-5)
    assert (quirk[:, 3:] - guided[:, 3:]).abs().max() > 0.01


# --- Cost


@pytest.mark.parametrize(
    ("size", "millions", "giga"), [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)]
)
def test_sizes_are_the_papers(size, millions, giga):
    """Table 4 of the paper: parameters and Gflops (multiplications with their addition) of patches of 2 in a latent of
    32×32×4."""
    layers, dim, heads = model.SIZES[size]
    config = model.DiTConfig(32, 4, 2, dim, layers, heads, 1000)
    assert cost.parameters(config) / 1e6 == pytest.approx(millions, rel=0.006)
    assert cost.forward_flops(config) / 2e9 == pytest.approx(giga, rel=0.001)


def test_flops_and_parameters_are_those_counted():
    from torch.utils.flop_counter import FlopCounterMode

    config = shape()
    net = awake(config)
    assert sum(p.numel() for p in net.parameters()) == cost.parameters(config)
    from finetune import ops

    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        net(*inputs(config))
    assert counter.get_total_flops() == 4 * cost.forward_flops(config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_exact(dtype, checkpointing):
    from finetune import optim
    from finetune.diffusion.ema import Ema

    config = shape()
    net = awake(config).to(meters.TORCH_DTYPES[dtype])
    net.gradient_checkpointing = checkpointing
    optimizer, ema, given = optim.AdamW(net.parameters()), Ema(net), inputs(config)
    activations = meters.saved_bytes(net, lambda: net(*given))
    net(*given).sum().backward()
    optimizer.step()
    measured = {
        "weights": meters.weight_bytes(net),
        "gradients": meters.gradient_bytes(net),
        "optimizer states": meters.optimizer_bytes(optimizer),
        "EMA": meters.storage_bytes(ema.average.values()),
        "activations": activations,
    }
    plan = cost.plan(config, 4, dtype, checkpointing)
    assert measured == {term.name: term.bytes for term in plan.terms}
    assert all(row["predicted"] == row["measured"] for row in plan.rows())
    assert plan.peak.bytes == sum(measured.values())
