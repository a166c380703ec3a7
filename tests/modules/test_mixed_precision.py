"""The mixed_precision module: formats, rounding and loss scaling against torch, DeepSpeed and arithmetic; training."""

import csv
import dataclasses
import json
import math
import random

import pytest
import torch
from resumed import cut_off
from seeds import OTHERS
from summaries import check_values

from finetune import ops
from finetune.errors import UserError
from finetune.ops.cast import random_words
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("mixed_precision")
main = registry.load(INFO)
formats, scaling = (registry.part("mixed_precision", name) for name in ("formats", "scaling"))
SOUND = ("bf16", "bf16_stochastic", "fp16_scaled", "fp8")
HALVES = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)  # all 65 536


def toy(**changes):
    return dataclasses.replace(main.Config.toy(), threads=1, **changes)


def small(**changes):
    """A few steps of a tiny model, for what does not depend on how well it learns."""
    return toy(
        **{"steps": 3, "dim": 16, "layers": 1, "heads": 2, "length": 16, "batch": 2, "eval_batches": 1} | changes
    )


def run(folder, config, **changes):
    return execute(INFO, config, folder, toy=True, **changes)


# --- Rounding


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_casts_equal_torchs_on_all_fp16_inputs(dtype):
    """Finite numbers within range are equal bit for bit; larger ones saturate; NaN stays NaN."""
    ours, theirs = formats.to_fp8(HALVES.float(), dtype), HALVES.to(dtype)
    inside = HALVES.abs() <= formats.LARGEST[dtype]
    assert inside.sum() > 40_000
    assert torch.equal(ours.view(torch.uint8)[inside], theirs.view(torch.uint8)[inside])
    beyond = ~inside & ~HALVES.isnan()
    assert torch.equal(ours.float()[beyond], HALVES.float()[beyond].sign() * formats.LARGEST[dtype])
    assert ours.float()[HALVES.isnan()].isnan().all()


def test_stochastic_rounding_is_a_neighbor_and_right_on_average():
    x = torch.tensor([1.0 + 1 / 1024, -3.1415927, 1e-3, 65504.0, 1.0, 0.0])
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(1 << 16, (4000, len(x)), dtype=torch.int32, generator=g)
    drawn = torch.stack([formats.round_by_hand(x, row) for row in noise]).double()
    for i, value in enumerate(x.double()):
        step = 2.0 ** (math.floor(math.log2(abs(value))) - 7) if value else 1.0
        assert ((drawn[:, i] - value).abs() < step).all()
        assert abs(drawn[:, i].mean() - value) < 5 * step / math.sqrt(4000)
    exact = x.bfloat16().float() == x
    assert torch.equal(drawn[0][exact], x.double()[exact])


def test_over_all_noise_the_share_rounded_up_is_exact():
    """Over all 65 536 random numbers the share rounded up is the distance that was cut off."""
    noise = torch.arange(1 << 16, dtype=torch.int32)
    x = torch.tensor(1.0 + 1e-4).expand(1 << 16)
    up = (formats.round_by_hand(x, noise).float() > 1).sum().item()
    assert up == round((float(x[0]) - 1) * 128 * 65536)


def test_stochastic_rounding_by_hand_is_the_ops():
    """Bit for bit: the op rounds up where its random word lies below what is cut off."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 5000)
    noise = 65535 - (random_words(len(x), 77, x.device) >> 16).int()
    want = ops.cast(x, torch.bfloat16, rounding="stochastic", seed=77)
    assert torch.equal(formats.round_by_hand(x, noise), want)
    assert not torch.equal(x.bfloat16(), want)


def test_stochastic_rounding_keeps_infinities_and_nan():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    got = formats.round_by_hand(x, torch.full((3,), 65535, dtype=torch.int32))
    assert got[0] == math.inf
    assert got[1] == -math.inf
    assert got[2].isnan()


# --- Loss scaling


def patterns():
    yield [False, False, True, False, False]
    for seed in range(6):
        draw = random.Random(seed)
        yield [draw.random() < 0.25 for _ in range(200)]
    yield [True] * 60
    yield [False] * 60


def follow(policy, interval, hysteresis, overflows):
    """The scales that our plain scaler goes through, from 65536; those of the one over the op are the same."""
    plain = scaling.PlainScaler(policy, 65536.0, interval, hysteresis=hysteresis)
    op = scaling.LossScaler(policy, 65536.0, interval, hysteresis)
    seen = []
    for overflow in overflows:
        plain.update(overflow)
        op.update(torch.tensor(float(overflow)))
        seen.append(plain.scale)
        assert op.scale.item() == min(plain.scale, 2.0**127), "fp32 has no larger power of two"
        if plain.scale >= 2.0**127:
            break
    return seen


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_scales_equal_gradscalers(interval):
    for overflows in patterns():
        theirs = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=interval)
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer, seen = torch.optim.SGD([weight], lr=0.0), []
        for overflow in overflows:
            theirs.scale(weight.sum())
            weight.grad = torch.full((1,), math.inf if overflow else 1.0)
            theirs.step(optimizer)
            theirs.update()
            seen.append(theirs.get_scale())
        mine = follow("torch", interval, 1, overflows)
        assert mine == seen[: len(mine)]


def test_the_published_sequence():
    """65536, growth interval 2, ok ok inf ok ok: torch and DeepSpeed differ by design."""
    overflows = [False, False, True, False, False]
    assert follow("torch", 2, 1, overflows) == [65536, 131072, 65536, 65536, 131072]
    assert follow("deepspeed", 2, 1, overflows) == [65536, 65536, 32768, 32768, 32768]


@pytest.mark.peer
@pytest.mark.parametrize("interval", [1, 2, 7])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_scales_equal_deepspeeds(interval, hysteresis, monkeypatch):
    theirs = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(theirs.dist, "get_rank", lambda: 1)  # without a process group; rank 0 would log
    for overflows in patterns():
        other = theirs.DynamicLossScaler(65536.0, interval, 1.0, hysteresis, False, raise_error_at_min_scale=False)
        seen = []
        for overflow in overflows:
            other.update_scale(overflow)
            seen.append(other.loss_scale)
        mine = follow("deepspeed", interval, hysteresis, overflows)
        assert mine == seen[: len(mine)]


# --- fp8


def test_fp8_linear_equals_torchs_casts_and_products():
    """Output and gradients of the second call, from torch's own casts and the maxima of the first."""
    torch.manual_seed(0)
    layer = formats.Fp8Linear(torch.nn.Linear(24, 10))
    first, x = torch.randn(7, 24), torch.randn(7, 24, requires_grad=True)
    g0, g = torch.randn(7, 10), torch.randn(7, 10)
    layer(first).backward(g0)
    layer.weight.grad = layer.bias.grad = None
    y = layer(x)
    y.backward(g)

    def rounded(t, past, dtype):
        factor = formats.LARGEST[dtype] / past.abs().max()
        return (t * factor).clamp(-formats.LARGEST[dtype], formats.LARGEST[dtype]).to(dtype).double() / factor

    e4, e5 = formats.E4M3, formats.E5M2
    x8, w8 = rounded(x.detach(), first, e4), rounded(layer.weight.detach(), layer.weight.detach(), e4)
    g8 = rounded(g, g0, e5)
    for got, want in (
        (y.detach() - layer.bias.detach(), x8 @ w8.t()),
        (x.grad, g8 @ w8),
        (layer.weight.grad, g8.t() @ x8),
        (layer.bias.grad, g.double().sum(0)),
    ):
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


def test_amax_forgets():
    amax = formats.Amax(formats.E4M3, 3)
    factors = [amax.quantize(torch.tensor([float(v)]))[1] for v in (8, 2, 2, 2, 2)]
    assert factors == [1.0, 56.0, 56.0, 56.0, 224.0], "448 over the largest of the last three, 1 without any"


def test_fp8_replaces_the_blocks_linears_only():
    text = main.load(None, 16)
    config = small()
    with_fp8 = [n for n, m in model_of("fp8", config, text).named_modules() if isinstance(m, formats.Fp8Linear)]
    assert with_fp8 == ["blocks.0.attn.qkv", "blocks.0.attn.o", "blocks.0.mlp.up", "blocks.0.mlp.down"]


def model_of(name, config, text):
    class Seeds:
        def seed(self, *key):
            torch.manual_seed(0)

    return main.new_model(config, Seeds(), formats.FORMATS[name], text)


# --- Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed_precision") / "run"
    return folder, run(folder, toy())


def check_claims(summary):
    metrics, checks = summary["metrics"], check_values(summary)
    assert summary["passed"]
    assert set(metrics) == {f"loss_{name}" for name in ("fp32", "fp16", *SOUND)}, "six results"
    assert checks["lost_weights"] >= 0.3
    assert checks["lost_activations"] >= 0.3
    assert checks["lost_weights_scaled"] < 0.01
    assert metrics["loss_fp16"] > metrics["loss_fp32"] + 0.1
    for name in SOUND:
        assert metrics[f"loss_{name}"] <= metrics["loss_fp32"] + 0.1 * (checks["loss_before"] - metrics["loss_fp32"])
    assert metrics["loss_fp32"] < checks["loss_before"] - 1.5
    assert checks["sum_bf16"] == 1.0
    assert abs(checks["sum_master"] - 1.1) < 2**-8, "to the nearest bf16"
    assert checks["sum_stochastic_error"] < 0.01
    assert checks["skipped_steps"] >= 1


def test_toy(trained):
    check_claims(trained[1])


@pytest.mark.parametrize("seed", OTHERS)
def test_toy_on_other_seeds(tmp_path, seed, no_pictures):
    check_claims(run(tmp_path / "run", toy(seed=seed)))


def test_memory_is_exact(trained):
    rows = {row["name"]: row for row in trained[1]["memory"]}
    assert len(rows) == 3 * len(formats.FORMATS) + 1
    for name, row in rows.items():
        assert row["predicted"] == row["measured"] > 0, name
    count = rows["fp32: weights"]["measured"] // 4
    each = {name: sum(rows[f"{name}: {part}"]["measured"] for part in ("weights", "gradients", "optimizer states"))
            for name in formats.FORMATS}  # fmt: skip
    assert each["fp32"] == each["bf16"] == each["fp16_scaled"] == 16 * count, "half the weights, but a master"
    assert each["bf16_stochastic"] == each["bf16_no_master"] == 12 * count


def test_run_folder(trained):
    folder, _ = trained
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {row["phase"] for row in rows} == set(formats.FORMATS)
    first = {row["phase"]: float(row["loss"]) for row in rows if row["step"] == "0"}
    assert max(first.values()) - min(first.values()) < 0.02, "the same weights and data for all, but for rounding"
    scales = [float(row["scale"]) for row in rows if row["scale"]]
    assert scales[0] == 2.0**30
    assert all(math.log2(scale).is_integer() for scale in scales)
    for picture in ("loss_by_format.png", "gradient_exponents.png", "loss_scale.png", "training_curves.png"):
        assert (folder / picture).stat().st_size > 15_000


def test_unscaled_fp16_stalls_for_want_of_gradients_and_not_of_range(trained, tmp_path):
    """With the loss divided by this process's own tokens the same fp16 learns: it was the small numbers."""
    near = run(tmp_path / "run", toy(formats="fp32,fp16", tokens_per_step=8 * 64, steps=120))
    small_batch, gpt3s_batch = check_values(near), check_values(trained[1])
    assert small_batch["lost_weights"] < 0.1 < gpt3s_batch["lost_weights"]
    assert small_batch["fp16_is_worse_by"] < 0.1 < gpt3s_batch["fp16_is_worse_by"]


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}])
def test_without_training_there_is_no_gain(tmp_path, change):
    summary = run(tmp_path / "run", small(**{"formats": "fp32,bf16,fp16_scaled"} | change))
    assert summary["passed"] is False
    assert summary["metrics"]["loss_fp32"] == check_values(summary)["loss_before"]


def test_same_seed_same_bytes_and_a_stopped_run_resumes(tmp_path):
    config = small(steps=6, checkpoint_every=2, growth_interval=2, formats="fp32,bf16_stochastic,fp8,fp16_scaled")
    run(tmp_path / "whole", config)
    run(tmp_path / "again", config)
    first = (tmp_path / "whole/metrics.csv").read_bytes()
    assert (tmp_path / "again/metrics.csv").read_bytes() == first
    with cut_off(6 * 3 + 4):  # in the fourth step of fp16_scaled
        run(tmp_path / "cut", config)
    summary = run(tmp_path / "cut", config, resume=True)
    assert (tmp_path / "cut/metrics.csv").read_bytes() == first
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["metrics"] == whole["metrics"]


def test_deepspeeds_policy_trains(tmp_path):
    summary = run(tmp_path / "run", small(steps=12, formats="fp32,fp16_scaled", policy="deepspeed", growth_interval=3))
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert len({row["scale"] for row in rows if row["scale"]}) > 1
    assert summary["metrics"]["loss_fp16_scaled"] < check_values(summary)["loss_before"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": "fp32,fp12"}, "--formats: 'fp12' is not one of fp32, bf16"),
        ({"batch": 0}, "--batch 0 is too small"),
        ({"dim": 10, "heads": 4}, "must be a multiple of heads"),
        ({"lr": math.nan}, "--lr nan is not a finite number"),
        ({"clip": 0.0}, "--clip 0 is too small"),
        ({"warmup": -1}, "--warmup -1 is too small"),
        ({"init_scale": math.inf}, "--init-scale inf is not a finite number"),
        ({"dim": 1 << 20, "layers": 1 << 12}, "of memory by the formulas"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", small(**change))


def test_own_data(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("abcdefgh " * 300)
    summary = run(tmp_path / "run", small(data=file, steps=40, formats="fp32,bf16", lr=1e-2))
    assert summary["metrics"]["loss_fp32"] < check_values(summary)["loss_before"] - 0.3
    file.write_text("too short")
    with pytest.raises(UserError, match="9 characters are too few"):
        run(tmp_path / "other", small(data=file))
    file.write_bytes(b"\xff\xfe\xfa" * 500)
    with pytest.raises(UserError, match="UTF-8"):
        run(tmp_path / "third", small(data=file))
