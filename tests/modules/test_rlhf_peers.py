"""The loss of stage 2, next to the losses of TRL and OpenRLHF on the same rewards, with gradients."""

import dataclasses
import inspect
import types

import pytest
import torch

from finetune.alignment.reward_model import pair_loss
from finetune.runs import registry

rlhf = registry.load(registry.find("rlhf"))
reward, data = registry.part("rlhf", "reward"), registry.part("rlhf", "data")
G = torch.Generator().manual_seed(0)
CHOSEN, REJECTED, MARGIN = (torch.randn(7, generator=G, dtype=torch.float64) * 3 for _ in range(3))


def with_gradients(loss):
    """(loss, its gradients by the rewards)."""
    leaves = [x.clone().requires_grad_() for x in (CHOSEN, REJECTED)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def same(one, other):
    for a, b in zip(with_gradients(one), with_gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_is_openrlhfs(margin):
    """PairWiseLoss of openrlhf/models/loss.py, written out: its package needs flash-attn."""

    def theirs(chosen, rejected):
        loss = -torch.nn.functional.logsigmoid(chosen - rejected - MARGIN if margin else chosen - rejected)
        return loss.mean()

    same(lambda c, r: pair_loss(c, r, MARGIN if margin else 0.0), theirs)


@pytest.mark.peer
@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_is_trls(margin):
    """RewardTrainer.compute_loss itself, on a model that returns given rewards."""
    trl = pytest.importorskip("trl")

    class Trainer:
        args = types.SimpleNamespace(center_rewards_coefficient=0.05)
        model = types.SimpleNamespace(training=False)
        accelerator = types.SimpleNamespace(
            gather_for_metrics=lambda x: x, gather=lambda x: x, is_main_process=True, reduce=lambda x, **_: x
        )

        def __init__(self):
            from collections import defaultdict

            self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            self._total_train_tokens = 0
            self.state = types.SimpleNamespace(num_input_tokens_seen=0)

    def theirs(chosen, rejected):
        inputs = {"input_ids": torch.ones(14, 1, dtype=torch.long), "attention_mask": torch.ones(14, 1)}
        if margin:
            inputs["margin"] = MARGIN
        model = lambda **_: types.SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])  # noqa: E731
        return trl.RewardTrainer.compute_loss(Trainer(), model, inputs)

    assert "center_rewards_coefficient" in inspect.getsource(trl.RewardTrainer.compute_loss)
    same(lambda c, r: pair_loss(c, r, MARGIN if margin else 0.0, 0.05), theirs)


def test_the_step_has_that_loss():
    """Chosen ones first, a margin by the gap: as in the formula."""

    class Given:
        def __call__(self, batch):
            return torch.cat([CHOSEN, REJECTED])[:, None]

    from finetune.data.packing import Document

    pairs = [data.Pair(Document([1, 2], [0, 1]), Document([1, 3], [0, 1]), float(m.abs())) for m in MARGIN]
    cfg = dataclasses.replace(rlhf.Config.toy(), margin=2.0, centering=0.05)
    loss, margins = reward.loss_of(cfg, Given(), pairs)
    each = -torch.log(torch.sigmoid(CHOSEN - REJECTED - 2 * MARGIN.abs().float())) + 0.05 * (CHOSEN + REJECTED) ** 2
    torch.testing.assert_close(loss, each.mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(margins, CHOSEN - REJECTED)
