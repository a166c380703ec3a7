"""The average of the weights: its closed form, evaluation that leaves training bit-equal, resume."""

import pytest
import torch
from torch import nn

from finetune.diffusion.ema import Ema


def trained(model, ema, steps, first=0, evaluate=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if evaluate:
            with ema.swapped() as averaged:
                averaged(x)


def made(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, Ema(model, 0.9)


def test_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.5)
    values = [model.weight.item(), 0.3, -1.2, 2.0, 0.7, 5.0, -3.0, 1.0, 1.5, 0.2, 4.0, -1.0]
    for value in values[1:]:
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update()
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(1, len(values))]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays[-1] == 0.5
    expected = 0.0
    for i, value in enumerate(values):  # Σ_i (1 − d_i) Π_{j>i} d_j θ_i, with the initial weight undiscounted
        share = 1.0 if i == 0 else 1 - decays[i - 1]
        for decay in decays[i:]:
            share *= decay
        expected += share * value
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_training_bit_equal():
    (plain, a), (watched, b) = made(), made()
    trained(plain, a, 20)
    trained(watched, b, 20, evaluate=True)
    for name, p in plain.named_parameters():
        assert torch.equal(p, dict(watched.named_parameters())[name])
        assert torch.equal(a.average[name], b.average[name])


def test_swapped_gives_the_average_and_restores_even_after_an_error():
    model, ema = made()
    trained(model, ema, 3)
    own = model.weight.detach().clone()
    with ema.swapped() as averaged:
        assert torch.equal(averaged.weight, ema.average["weight"])
        assert not torch.equal(averaged.weight, own)
    assert torch.equal(model.weight, own)

    def fails():
        with ema.swapped():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert torch.equal(model.weight, own)


def test_it_survives_a_resume_to_the_bit():
    model, ema = made()
    trained(model, ema, 10)
    state = {"model": {k: v.clone() for k, v in model.state_dict().items()},
             "ema": {"updates": ema.updates, "average": {k: v.clone() for k, v in ema.average.items()}}}  # fmt: skip
    trained(model, ema, 20, first=10)
    again, other = made(seed=1)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["ema"])
    trained(again, other, 20, first=10)
    assert torch.equal(other.average["weight"], ema.average["weight"])
    with pytest.raises(ValueError, match="decay"):
        Ema(model, 1.0)
