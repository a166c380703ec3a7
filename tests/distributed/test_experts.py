"""Experts on several ranks: against a plain loop over tokens in one process, whatever the layout."""

import copy

import on_ranks
import pytest
import torch
import torch.nn.functional as F
from on_ranks import assembled, batch_of, config_of

from finetune.distributed.experts import MixtureSettings
from finetune.distributed.mesh import Layout
from finetune.distributed.stage import initial
from finetune.errors import UserError
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama

FIVE = MixtureSettings(experts=5, top=2, balance=0.1)


class Plain(torch.nn.Module):
    """The definition: every token by itself; the balance loss of the latest pass is kept."""

    def __init__(self, mlp, dim, settings):
        super().__init__()
        self.router = torch.nn.Linear(dim, settings.experts, bias=False)
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(settings.experts))
        self.settings = settings

    def forward(self, x):
        tokens = x.flatten(0, 1)
        p = self.router(tokens).softmax(-1)
        y, used = [], torch.zeros(self.settings.experts)
        for i, token in enumerate(tokens):
            gates, chosen = p[i].topk(self.settings.top)
            used[chosen] += 1
            y.append(sum(g / gates.sum() * self.experts[e](token[None])[0] for g, e in zip(gates, chosen, strict=True)))
        self.balance = self.settings.experts * (used / used.sum() * p.mean(0)).sum()
        return torch.stack(y).view_as(x)


def alone(name, rows, settings):
    config = config_of(name)
    model = GPT(config) if name == "gpt" else Llama(config)
    weights = initial(config, 3, settings.experts)
    for block in model.blocks:
        block.mlp = Plain(block.mlp, config.dim, settings)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(weights(key) * (6 if p.dim() == 2 else 1))
    logits = model(rows[:, :-1].clamp(min=0)).flatten(0, 1)
    loss = F.cross_entropy(logits, rows[:, 1:].flatten(), ignore_index=-100)
    balance = torch.stack([block.mlp.balance for block in model.blocks])
    (loss + settings.balance * balance.sum()).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    norm = torch.stack([g.double().norm() for g in grads.values() if g is not None]).norm().item()
    return loss.item(), norm, grads, balance.detach()


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=pytest.mark.long)])
def test_gradients_equal_the_definition(two, four, name):
    """5 experts over 1, 2 and 4 ranks: 3 and 2; 2, 1, 1, 1."""
    rows = batch_of(rows=4)
    loss, norm, grads, balance = alone(name, rows, FIVE)
    for ranks, layout, options in (
        (two, Layout(dp=2, ep=2), {}), (two, Layout(dp=2), {}), (four, Layout(dp=4, ep=4), {"sharded": True}),
        (four, Layout(dp=4, ep=2), {"sharded": True, "bucket": 3000}), (four, Layout(pp=2, dp=2, ep=2), {}),
        (four, Layout(dp=2, cp=2, ep=2), {}), (two, Layout(dp=2, ep=2), {"recompute": "block"}),
    ):  # fmt: skip
        answers = ranks.call(on_ranks.routed, name, layout, rows, FIVE, **options)
        whole = assembled(piece for answer in answers for piece in answer[2])
        assert whole.keys() == grads.keys()
        for key, expected in grads.items():
            expected = torch.zeros_like(whole[key]) if expected is None else expected
            torch.testing.assert_close(whole[key], expected, rtol=1e-3, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
        for answer in answers:
            assert answer[0] == pytest.approx(loss, rel=1e-5)
            assert answer[1] == pytest.approx(norm, rel=1e-4)
            assert answer[5] == 0
        stages = [answers[i][4] for i in range(len(answers)) if layout.place(i)["dp"] == layout.place(i)["cp"] == 0]
        torch.testing.assert_close(torch.cat(stages), balance)


def test_tokens_travel_in_four_all_to_alls(two):
    """Two forward, two backward, and the counts; 3/4 · bytes: with 2 ranks half of each message leaves."""
    rows = batch_of(rows=4, ignored=0)
    for _, _, _, (calls, sent), *_ in two.call(on_ranks.routed, "gpt", Layout(dp=2, ep=2), rows, FIVE):
        assert calls["all_to_all", "ep"] == 4 * (4 + 1)
        assert sent["all_to_all", "ep"] > 4 * 2 * (2 * 16 * 2 * 24 * 4) // 2


def test_an_expert_takes_no_more_than_its_capacity(two):
    """Of 32 tokens and 64 choices of 5 experts, with capacity 1: 13 each at most. Unlimited: none is dropped."""
    rows = batch_of(rows=4, ignored=0)
    full = two.call(on_ranks.routed, "gpt", Layout(dp=2, ep=2), rows, FIVE)
    tight = two.call(on_ranks.routed, "gpt", Layout(dp=2, ep=2), rows, FIVE._replace(capacity=0.3))
    assert [answer[5] for answer in full] == [0, 0]
    # ⌈0.3 · 2 · 32 / 5⌉ = 4 a rank and expert: 20 of 64 choices at most find room in each of 4 layers
    assert all(answer[5] >= 4 * (64 - 20) for answer in tight)
    assert tight[0][0] != full[0][0]


def test_checkpoints_of_experts_are_read_by_other_layouts(two, four, tmp_path):
    losses = four.call(on_ranks.mixture_trained, Layout(dp=4, ep=2), tmp_path, FIVE, sharded=True)
    for layout, options in ((Layout(dp=2, ep=2), {}), (Layout(pp=2), {}), (Layout(dp=2), {"sharded": True})):
        for found in two.call(on_ranks.mixture_trained, layout, tmp_path, FIVE, load=True, **options):
            assert found == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "mixture", "options", "said"),
    [
        (Layout(tp=2), FIVE, {}, "experts: tp 2 is not supported; use tp 1 and ep"),
        (Layout(dp=2, ep=2), FIVE._replace(experts=1, top=1), {}, "ep 2 is too large: there are 1 experts"),
        (Layout(dp=2), FIVE._replace(top=6), {}, "a token cannot go to 6 of 5 experts"),
        (Layout(dp=2), FIVE, {"recompute": "selective"}, "selective recomputation is not supported"),
    ],
)
def test_what_experts_do_not_support_is_refused(two, layout, mixture, options, said):
    with pytest.raises(UserError, match=said):
        two.call(on_ranks.routed, "gpt", layout, batch_of(), mixture, **options)
