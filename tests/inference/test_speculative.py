"""Speculation changes no answer (greedy, or guesses copied from the text) and no distribution (guesses of a model)."""

import pytest
import torch
from small_served import llama, prompts

from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling, draw, probabilities, uniform
from finetune.inference.scheduler import Sequence
from finetune.inference.speculative import GUESS, DraftModel, PromptLookup, verified

SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=3)


def answers(model, how, drafter=None, **limits):
    engine = Engine(model, **({"blocks": 200} | limits), drafter=drafter)
    sequences = [engine.add(prompt, how, 20) for prompt in prompts()]
    engine.run()
    assert engine.pool.used == 0
    return [one.answer for one in sequences], engine


@pytest.mark.parametrize("limits", [{}, {"blocks": 15, "block_size": 4}, {"most_tokens": 3}], ids=str)
def test_answers_are_those_without_speculation(limits):
    model, other = llama(), llama(tied=False)
    drafters = {
        "lookup": lambda: PromptLookup(3, 2),
        "itself": lambda: DraftModel(model, 200, count=3),
        "another": lambda: DraftModel(other, 200, count=3),
        "without room": lambda: DraftModel(model, 4, count=3),
    }
    greedy, _ = answers(model, Sampling(), **limits)
    for name, make in drafters.items():
        found, engine = answers(model, Sampling(), make(), **limits)
        assert found == greedy, name
        assert engine.accepted <= engine.proposed
        if name == "itself" and not limits:
            assert engine.accepted == engine.proposed > 100
        if isinstance(engine.drafter, DraftModel):
            assert (engine.drafter.pool.used, engine.drafter.shadows) == (0, {})
    sampled, _ = answers(model, SAMPLED, **limits)
    assert answers(model, SAMPLED, PromptLookup(3, 2), **limits)[0] == sampled


def test_guesses_are_what_followed_before():
    lookup = PromptLookup(count=3, longest=2)
    assert lookup.following([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]
    assert lookup.following([1, 2, 7, 1, 2, 8, 1, 2]) == [8, 1, 2]  # the last time
    assert lookup.following([7, 2, 5, 3, 2]) == [5, 3, 2]  # one token, where two did not occur
    assert lookup.following([1, 2, 3]) == lookup.following([1]) == []


def test_a_draft_far_from_the_model_leaves_its_distribution():
    """Pairs of tokens, the first guessed, over 8 tokens, temperature 0.7 and top-p 0.9: chi-square stays below its
    99.99 % point (about df + 3.9 √(2 df) + 8)."""
    g = torch.Generator().manual_seed(0)
    table = 2 * torch.randn(9, 8, generator=g)  # the model's logits after each token; row 8: at the beginning
    far = 2 * torch.randn(9, 8, generator=g)
    exact, rounds, accepted = torch.zeros(8, 8, dtype=torch.float64), 10_000, 0
    how = Sampling(temperature=0.7, top_p=0.9)
    first = probabilities(table[8], how)
    for a in range(8):
        exact[a] = first[a] * probabilities(table[a], how)
    p = [probabilities(row, how) for row in table]
    q = [probabilities(row, how) for row in far]
    found = torch.zeros(8, 8)
    for seed in range(rounds):
        one = Sequence([0], Sampling(temperature=0.7, top_p=0.9, seed=seed), 2)
        a = draw(q[8], uniform(seed, 0, GUESS))
        one.guesses, one.guessed_from = [a], [q[8]]
        new = verified(one, table[[8, a]])
        accepted += len(new) - 1
        if len(new) == 1:  # rejected: the second token is drawn by itself
            new.append(draw(p[new[0]], uniform(seed, 1)))
        found[new[0], new[1]] += 1
    possible = exact > 0
    assert found[~possible].sum() == 0
    expected = rounds * exact[possible]
    statistic, freedom = float(((found[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1
    assert statistic < freedom + 3.9 * (2 * freedom) ** 0.5 + 8
    assert 0.1 < accepted / rounds < 0.6
    assert abs(accepted / rounds - float(torch.minimum(p[8], q[8]).sum())) < 0.02  # 1 − total variation


def test_guesses_preempt_nobody():
    """Two sequences that just fit: with guesses too none is preempted."""
    model = llama()
    engine = Engine(model, blocks=12, block_size=4, drafter=PromptLookup(8, 1))
    sequences = [engine.add([5] * 4, Sampling(), 20), engine.add([6] * 4, Sampling(), 20)]
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert all(len(one.answer) == 20 for one in sequences)
