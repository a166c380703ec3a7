"""The inference module: its toy run, and each experiment's counting by hand, without a model where none is needed."""

import dataclasses

import pytest
import torch
from resumed import cut_off
from summaries import check_values

from finetune.data.toy_directory import small_llama
from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.speculative import DraftModel, PromptLookup
from finetune.runs import registry
from finetune.runs.run import Run, execute

INFO = registry.find("inference")
main = registry.load(INFO)
NAMES = ("lab", "blocks", "recompute", "prefix", "chunked", "speculation", "quantization", "roofline", "load_curve",
         "invariance", "plots")  # fmt: skip
lab, blocks, recompute, prefix, chunked, speculation, quantization, roofline, load_curve, invariance, plots = (
    registry.part("inference", name) for name in NAMES
)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder and the summary of the toy run."""
    folder = tmp_path_factory.mktemp("inference") / "run"
    return folder, execute(INFO, dataclasses.replace(main.Config.toy(), threads=1), folder, toy=True)


@pytest.fixture
def a_lab(tmp_path):
    """seed → a lab over the small model as it is initialized."""

    def make(seed=0, **changes):
        cfg = dataclasses.replace(main.Config.toy(), seed=seed, rounds=1, requests=100, **changes)
        run = Run(tmp_path / str(seed), cfg, toy=True)
        run.seed("model")
        return lab.Lab(cfg, run)

    return make


def test_the_toy_reaches_its_targets(toy):
    folder, summary = toy
    assert summary["passed"] is True, (summary["reached"], summary["checks"])
    assert len(summary["metrics"]) == 6
    assert set(summary["baseline"]) == set(summary["target"]) == set(summary["metrics"])
    assert summary["checks"]["experiments"]["value"] == len(main.EXPERIMENTS) == 10
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures >= {*main.EXPERIMENTS, "memory"}
    check_values(summary)


def test_bytes_of_weights_and_cache_are_those_of_the_formulas(toy):
    _, summary = toy
    assert len(summary["memory"]) == 8
    assert all(row["predicted"] == row["measured"] for row in summary["memory"]), summary["memory"]


def test_a_run_of_one_experiment(tmp_path):
    cfg = dataclasses.replace(main.Config.toy(), experiment="blocks", requests=100)
    summary = execute(INFO, cfg, tmp_path / "run", toy=True)
    assert list(summary["metrics"]) == ["kv_wasted"]
    assert not (tmp_path / "run/checkpoints/training").exists(), "it needs no model"


def test_a_run_without_steps_shows_nothing(tmp_path):
    summary = execute(INFO, dataclasses.replace(main.Config.toy(), steps=0), tmp_path / "run", toy=True)
    assert summary["metrics"] == {}
    assert summary["passed"] is False


def test_a_resumed_run_continues_with_the_next_experiment(tmp_path, monkeypatch):
    cfg = dataclasses.replace(main.Config.toy(), train_steps=2, requests=64, rounds=1, steps=3)
    with cut_off(2 + 2):  # two steps of training, the blocks; the second experiment is not finished
        execute(INFO, cfg, tmp_path / "run", toy=True)
    monkeypatch.setattr(blocks, "measure", None)
    summary = execute(INFO, cfg, tmp_path / "run", toy=True, resume=True)
    assert {"kv_wasted", "batch_throughput"} <= set(summary["metrics"])
    assert summary["checks"]["experiments"]["value"] == 3
    assert not summary["checks"]["experiments"]["passed"], "seven experiments are missing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "q4"}, "--format: 'q4' is not one of"),
        ({"formats": "fp32,int5"}, "--formats: 'int5' is not one of .*int4"),
        ({"formats": "bf16,int4"}, "--formats: fp32 is what the others are compared with"),
        ({"rounds": 0}, "--rounds 0 is too small"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        main.Config(**changes)


# --- cache


def test_recomputation_gives_the_same_tokens(a_lab):
    assert recompute.same_tokens(a_lab()) == 1


def test_integral():
    assert plots.integral([2, 4, 8], [3, 5, 5]) == [6, 14, 34]


# --- blocks


def test_blocks_are_counted_as_by_hand():
    """One sequence of 3 + 3 tokens in blocks of 4: it stores 3, 4 and 5 of 4, 4 and 8 slots; the last token is chosen
    and not stored."""
    found = blocks.serve([(3, 3)], 64, 4)
    assert found["stored"] == pytest.approx((3 + 4 + 5) / 3)
    assert found["reserved"] == pytest.approx((4 + 4 + 8) / 3)
    assert (found["running"], found["steps"], found["preempted"]) == (1, 3, 0)


def test_one_long_block_is_a_contiguous_reservation():
    found = blocks.serve([(2, 2)] * 12, 40, 10)
    assert found["running"] == 4
    assert found["reserved"] == 40


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_waste_half_a_block(a_lab, seed):
    the_lab = a_lab(seed)
    found = blocks.measure(the_lab)
    blocks.judge(the_lab.run, found)
    assert all(row["passed"] for row in the_lab.run.checks.values()), the_lab.run.checks
    assert the_lab.run.judged["kv_wasted"]["passed"]
    assert blocks.wasted(found["served"][0]) == 0, "blocks of one token"


# --- prefix cache, chunks


def test_hits_are_counted_to_the_token(a_lab):
    found = prefix.measure(a_lab())
    whole = prefix.SYSTEM // lab.BLOCK * lab.BLOCK
    assert found["with"]["hits"] >= (prefix.REQUESTS - 1) * whole
    assert found["without"]["hits"] == 0
    total = found["without"]["misses"]
    assert found["with"]["hits"] + found["with"]["misses"] == total
    assert found["with"]["answers"] == found["without"]["answers"]


def test_prompts_that_differ_from_the_start_hit_nothing(a_lab, monkeypatch):
    """The control: with a first token of its own, no prompt shares a block with another."""
    the_lab = a_lab()
    add, count = Engine.add, iter(range(10_000))
    monkeypatch.setattr(Engine, "add", lambda self, prompt, *rest: add(self, [next(count) % 250, *prompt[1:]], *rest))
    found = prefix.measure(the_lab)
    assert found["with"]["hits"] == 0


def test_chunks_bound_a_step(a_lab):
    the_lab = a_lab()
    found = chunked.measure(the_lab)
    for budget, steps in chunked.gaps(found).items():
        assert len(steps) == -(-chunked.PROMPT // (budget - chunked.OTHERS))


# --- speculation


def counted(model, drafter, guesses, prompt, answer):
    wrapped = speculation.Counted(drafter, guesses)
    engine = Engine(model, 64, 16, drafter=wrapped)
    engine.add(prompt, Sampling(), answer)
    engine.run()
    return wrapped


def test_a_perfect_draft_is_always_accepted(a_lab):
    model = a_lab().model
    found = counted(model, DraftModel(model, 64, 16, 4), 4, [*range(20)], 41)
    assert (found.passes, found.accepted, found.rejected) == (8, 32, 0)  # 1 + 8 · 5 tokens


def test_a_draft_that_never_learned_is_at_the_baseline(a_lab):
    the_lab = a_lab()
    torch.manual_seed(1)
    other = small_llama(lab.DRAFT).eval()
    found = counted(the_lab.model, DraftModel(other, 64, 16, 4), 4, [*range(20)], 41)
    assert found.accepted / found.passes < 0.5
    assert found.passes == found.rejected + (found.accepted == 4 * found.passes)


def test_counting_follows_the_engine(a_lab):
    """n-grams on a text that the model repeats: accepted guesses are the engine's own count, where all γ were made."""
    model = a_lab().model
    found = counted(model, PromptLookup(2), 2, [1, 2, 3] * 8, 30)
    assert found.accepted <= 2 * found.passes
    assert found.rejected <= found.passes


@pytest.mark.parametrize(("alpha", "guesses", "tokens"), [(0.0, 4, 1), (1.0, 4, 5), (0.8, 4, 3.3616), (0.5, 1, 1.5)])
def test_expected_tokens(alpha, guesses, tokens):
    assert speculation.expected(alpha, guesses) == pytest.approx(tokens)


def test_expected_tokens_by_simulation():
    kept = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    mean = 1 + kept.int().cumprod(1).sum(1).double().mean()
    assert float(mean) == pytest.approx(speculation.expected(0.7, 5), abs=0.02)


# --- quantization


def test_naive_int4_has_fifteen_values_a_row(a_lab):
    model = a_lab().model
    before = model.blocks[0].mlp.up.weight.clone()
    rounded = quantization.naive(model).blocks[0].mlp.up.weight
    assert max(len(row.unique()) for row in rounded) <= 15
    assert torch.equal(model.blocks[0].mlp.up.weight, before)
    assert ((rounded - before).abs() <= before.abs().amax(1, keepdim=True) / 14 + 1e-7).all()


def test_few_bits_lose_little(toy):
    _, summary = toy
    checks = {name: row["value"] for name, row in summary["checks"].items()}
    assert checks["kl_bf16"] < checks["kl_int4"] < checks["kl_naive_int4"]
    assert checks["kl_int8"] < checks["kl_int4"]


# --- roofline, load, invariance


def test_the_roof_is_the_lower_of_two():
    found = {"peak": {"fp32": 100.0, "bf16": 50.0}, "bandwidth": 10.0}
    slope = {"flops": 20.0, "bytes": 10.0, "seconds": 2.0}  # 2 FLOPs a byte: 20 FLOP/s allowed, 10 reached
    flat = {"flops": 1000.0, "bytes": 10.0, "seconds": 20.0}  # 100 a byte: the peak of 100, 50 reached
    assert roofline.share(found, slope) == roofline.share(found, flat) == 0.5


class Clockwork:
    """An engine of one sequence at a time, a token a step."""

    def __init__(self):
        self.queue, self.changed = [], []

    def add(self, prompt, how, tokens):
        self.queue.append([prompt[0], tokens])
        return prompt[0]

    @property
    def busy(self):
        return bool(self.queue)

    def step(self):
        self.changed = [self.queue[0][0]]
        self.queue[0][1] -= 1
        if not self.queue[0][1]:
            self.queue.pop(0)


def test_latencies_of_an_open_loop_by_hand(monkeypatch):
    """Steps of a second; requests of 3, 2 and 2 tokens arrive at 0, 1.5 and 10."""

    def second(call):
        call()
        return 1.0

    monkeypatch.setattr(load_curve, "seconds", second)
    found = load_curve.open_loop(Clockwork(), [([7], 3), ([8], 2), ([9], 2)], [0.0, 1.5, 10.0])
    assert found == {"ttft": [1.0, 2.5, 1.0], "tpot": [1.0, 1.0, 1.0], "end": 12.0}


def test_goodput_counts_requests_within_both_limits():
    found = {"step": 2.0}  # so 20 s to the first token, 3 s for each other
    part = {"ttft": [1.0, 21.0, 20.0, 2.0], "tpot": [1.0, 1.0, 3.0, 3.1]}
    assert load_curve.good(found, part) == 0.5
    assert load_curve.goodput(found | {"capacity": 2.0}, part | {"end": 4.0}) == 0.25, "2 of 4 requests in 4 s"


def test_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [lab.percentile(values, share) for share in (0.2, 0.5, 0.95, 1.0)] == [1.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_weights_do_not_see_the_company(a_lab, seed):
    the_lab = a_lab(seed)
    invariance.judge(the_lab.run, invariance.measure(the_lab))
    assert all(row["passed"] for row in the_lab.run.checks.values()), the_lab.run.checks
    assert the_lab.run.checks["same_bits_packed"]["value"] == 1
