"""Speculation changes no answer (greedy, or guesses copied from the text) and no distribution (guesses of a model)."""

from dataclasses import replace

import pytest
import torch
from small_served import llama, prompts

from finetune.inference import speculative
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


def test_fifty_thousand_samples_with_a_bad_draft(monkeypatch):
    """Two tokens of 20, the first guessed from an unrelated distribution: the total variation from the model's own is
    at most .02 for each. Chance alone gives about Σ √(p (1 − p) / (2 π n)) = .006."""
    g = torch.Generator().manual_seed(1)
    count, how = 50_000, Sampling(temperature=1.0)
    table, far = 2 * torch.randn(21, 20, generator=g), 2 * torch.randn(20, generator=g)  # row 20: at the beginning
    q, logits = probabilities(far, how), [table[[20, guess]] for guess in range(20)]
    known = {row.data_ptr(): probabilities(row, how) for pair in logits for row in pair}
    monkeypatch.setattr(speculative, "probabilities", lambda row, *_: known[row.data_ptr()])  # computed once each
    own = torch.stack([probabilities(row, how) for row in table])
    found, accepted = torch.zeros(2, 20), 0
    for seed in range(count):
        one = Sequence([0], replace(how, seed=seed), 2)
        guess = draw(q, uniform(seed, 0, GUESS))
        one.guesses, one.guessed_from = [guess], [q]
        new = verified(one, logits[guess])
        accepted += len(new) - 1
        new += [draw(own[new[0]], uniform(seed, 1))] * (2 - len(new))
        for place, token in enumerate(new):
            found[place, token] += 1
    for place, exact in enumerate((own[20], own[20] @ own[:20])):
        assert 0.5 * float((found[place] / count - exact).abs().sum()) <= 0.02
    assert abs(accepted / count - float(torch.minimum(own[20], q).sum())) < 0.01
    assert 0.5 * float((own[20] - q).abs().sum()) > 0.4  # the draft is bad


def test_an_engine_with_a_far_draft_samples_from_its_model():
    """2,000 requests in batches, temperature 0.7 and top-p 0.9, a draft model: tokens 2 and 3 of each, which were
    guessed, against the exact distribution by chi-square (99.99 % point as above)."""
    model, far = llama(vocab_size=20), llama(vocab_size=20, tied=False)
    how, prompt, count = Sampling(temperature=0.7, top_p=0.9), [1, 2, 3, 4, 5], 2000

    def following(texts):
        with torch.no_grad():
            return [probabilities(row, how) for row in model(torch.tensor(texts))[:, -1]]

    # the distribution of each prefix of the answer, those of probability 0 skipped
    reached, exact = {(): 1.0}, []
    for _ in range(3):
        rows = following([[*prompt, *answer] for answer in reached])
        longer = {
            (*answer, token): weight * float(row[token])
            for (answer, weight), row in zip(reached.items(), rows, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
        exact.append(torch.zeros(20, dtype=torch.float64))
        for answer, weight in longer.items():
            exact[-1][answer[-1]] += weight
        reached = longer
    engine = Engine(model, blocks=1000, most_tokens=2048, drafter=DraftModel(far, 1000, count=2))
    asked = [engine.add(prompt, replace(how, seed=seed), 4) for seed in range(count)]
    engine.run()
    assert 0.05 < engine.accepted / engine.proposed < 0.8
    for place in (1, 2):
        found = torch.bincount(torch.tensor([one.answer[place] for one in asked]), minlength=20)
        assert int(found[exact[place] == 0].sum()) == 0
        often = exact[place] * count >= 5
        cells = torch.cat([found[often], found[~often].sum()[None]]).double()
        expected = count * torch.cat([exact[place][often], exact[place][~often].sum()[None]])
        cells, expected = cells[expected > 0], expected[expected > 0]
        statistic, freedom = float(((cells - expected) ** 2 / expected).sum()), len(cells) - 1
        assert statistic < freedom + 3.9 * (2 * freedom) ** 0.5 + 8


def test_guesses_preempt_nobody():
    """Two sequences that just fit: with guesses too none is preempted."""
    model = llama()
    engine = Engine(model, blocks=12, block_size=4, drafter=PromptLookup(8, 1))
    sequences = [engine.add([5] * 4, Sampling(), 20), engine.add([6] * 4, Sampling(), 20)]
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert all(len(one.answer) == 20 for one in sequences)
