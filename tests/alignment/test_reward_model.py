"""Reward and value models: what they read, losses against the formulas, learning, files."""

import math

import pytest
import torch
import torch.nn.functional as F

from finetune.alignment import reward_model
from finetune.alignment.gibbs import Problem
from finetune.alignment.reward_model import RewardModel, ValueModel, pair_loss
from finetune.data.packing import Document, collate
from finetune.errors import UserError
from finetune.lm.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=30, dim=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, max_length=64)


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG)


def documents() -> list[Document]:
    g = torch.Generator().manual_seed(1)
    found = []
    for i in range(4):
        ids = torch.randint(30, (5 + 2 * i,), generator=g).tolist()
        found.append(Document(ids, [0] * 3 + [1] * (len(ids) - 3)))
    return found


def states(model: Llama, document: Document) -> torch.Tensor:
    return model(torch.tensor([list(document.ids)]), hidden=True)[0]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rewards_of_packed_documents(model: Llama, pooling: str, heads: int):
    """As of each document by itself, so that neither neighbors nor padding change a reward."""
    reward = RewardModel(model, pooling, heads, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    found = reward(collate(documents()))
    assert found.shape == (4, heads)
    for row, document in zip(found, documents(), strict=True):
        h = states(model, document)[3:]
        pooled = h[-1] if pooling == "last" else h.mean(0)
        torch.testing.assert_close(row, reward.head.weight @ pooled, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reward(collate([document]))[0], row, rtol=1e-5, atol=1e-6)


def test_values_are_those_of_the_states_that_choose(model: Llama):
    value = ValueModel(model, torch.Generator().manual_seed(0))
    batch = collate(documents())
    wanted = torch.cat([states(model, d)[2:-1] for d in documents()]) @ value.head.weight[0]
    torch.testing.assert_close(value(batch), wanted, rtol=1e-5, atol=1e-6)
    reward = RewardModel(model, heads=2)
    value.begin_from(reward)
    assert torch.equal(value.head.weight[0], reward.head.weight.mean(0))


def test_caution_prefers_what_the_heads_agree_on(model: Llama):
    reward = RewardModel(model, heads=3)
    batch = collate(documents())
    each = reward(batch).detach()
    torch.testing.assert_close(reward.score(batch, 0.5), each.mean(1) - 0.5 * each.std(1))
    assert torch.isfinite(RewardModel(model).score(batch, 0.5)).all()


def test_pair_loss_written_out():
    c, r = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    margin = torch.tensor([0.1, 2.0])
    wanted = torch.stack([-F.logsigmoid(a - b - m) + 0.01 * (a + b) ** 2 for a, b, m in zip(c, r, margin, strict=True)])
    torch.testing.assert_close(pair_loss(c, r, margin, 0.01), wanted.mean())
    assert pair_loss(c, c).item() == pytest.approx(math.log(2))


def test_centering_puts_zero_in_the_middle():
    r = torch.tensor([5.0, 3.0], requires_grad=True)
    optimizer = torch.optim.SGD([r], lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        pair_loss(r[:1], r[1:], centering=0.05).backward()
        optimizer.step()
    assert abs(r.sum().item()) < 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_table_of_rewards_is_found(seed: int):
    """The enumerated problem: 20,000 pairs give the rewards up to a constant."""
    g = torch.Generator().manual_seed(seed)
    problem = Problem.random(g)
    chosen, rejected = problem.preferences(20_000, g)
    learned = torch.zeros(len(problem.rewards), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([learned], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        pair_loss(learned[chosen], learned[rejected]).backward()
        optimizer.step()
    often = torch.bincount(torch.cat([chosen, rejected]), minlength=len(learned)) > 200
    found = torch.stack([learned.detach(), problem.rewards])[:, often]
    assert torch.corrcoef(found)[0, 1] > 0.98


def test_calibration_of_a_model_that_is_right_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    margins = torch.randn(50_000, generator=g).abs() * 2
    right = torch.rand(50_000, generator=g) < torch.sigmoid(margins)
    rows = reward_model.calibration(torch.where(right, margins, -margins), bins=5)
    assert sum(count for *_, count in rows) == 50_000
    for predicted, share, count in rows:
        assert abs(predicted - share) < 4.5 * math.sqrt(0.25 / count)
    assert all(share > predicted for predicted, share, _ in reward_model.calibration(margins)[:-1])


def test_files(model: Llama, tmp_path):
    for pooling in ("last", "mean"):
        saved = RewardModel(model, pooling, 2, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
        saved.save(tmp_path)
        loaded = RewardModel(model)
        loaded.load(tmp_path)
        assert loaded.pooling == pooling
        batch = collate(documents())
        assert torch.equal(loaded(batch), saved(batch))
    other = RewardModel(Llama(LlamaConfig(vocab_size=30, dim=16, hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8)))
    with pytest.raises(UserError, match=r"reward.safetensors is not the head of a reward model of 16 numbers"):
        other.load(tmp_path)
