"""The losses of the module grpo and their gradients on a model's weights, next to those of TRL's GRPOTrainer."""

from dataclasses import replace

import pytest
import small_trl
import torch

from finetune import ops
from finetune.alignment import policy_loss
from finetune.alignment.policy_loss import NAMED, Answers, Settings, Totals
from finetune.alignment.shared_prompts import Group, Layout, token_logprobs
from finetune.lm.io import load
from finetune.lm.io.hf_llama import to_hf

PAD, MOST = 0, 8
GROUPS = [  # answers of unequal lengths, which a mean over padding would show
    Group([5, 6, 7], [[8, 9, 10, 1], [11, 12, 1]]),
    Group([5, 6], [[8, 1], [11, 12, 13, 14, 15, 16, 17, 18]]),
    Group([20], [[21, 22, 23, 9, 1], [3]]),
]
ADVANTAGES = torch.tensor([1.2, -1.2, 0.4, -0.4, -0.9, 0.9], dtype=torch.float64)
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """(their trainer, our model with the same weights, an older and a reference policy of ours)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    tokenizer, three = small_trl.llamas(folder, 3, 0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        trainer = GRPOTrainer(
            three[0],
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, num_generations=2,
                            per_device_train_batch_size=2, max_completion_length=MOST, beta=0.0),
            train_dataset=Dataset.from_list([{"prompt": "ab"}]),
            processing_class=tokenizer,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, *(load.llama(folder / str(i), torch.float64) for i in range(3))


def numbers(model):
    with ops.use_backend("reference"):
        return token_logprobs(model, Layout(GROUPS))


def padded(values):
    lengths = [len(a) for g in GROUPS for a in g.answers]
    return torch.nn.utils.rnn.pad_sequence(values.detach().split(lengths), batch_first=True)


def theirs(trainer, old, reference, loss_type, level, s: Settings, **more):
    prompts = [list(g.prompt) for g in GROUPS for _ in g.answers]
    answers = [torch.tensor(a) for g in GROUPS for a in g.answers]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    completions = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(a) for a in answers])
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": completions,
        "completion_mask": (torch.arange(completions.shape[1]) < lengths[:, None]).long(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": lengths.sum(),
    }
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": s.kl_weight,
                "epsilon_low": s.clip_low, "epsilon_high": 1 + s.clip_high if s.loss == "cispo" else s.clip_high,
                "top_entropy_quantile": s.entropy_share, "entropy_coef": s.entropy,
                "_entropy_bonus_enabled": bool(s.entropy)}  # fmt: skip
    args = {"use_bias_correction_kl": s.kl_ratio, "delta": s.two_sided or None, "steps_per_generation": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer, name, value)
        for name, value in args.items():
            patch.setattr(trainer.args, name, value)
        loss = trainer._compute_loss(trainer.model, inputs)
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def compared(peers, loss_type, level, s: Settings):
    trainer, policy, older, base = peers
    with torch.no_grad():
        old, reference = numbers(older)[0], numbers(base)[0]
    wanted = theirs(trainer, old, reference, loss_type, level, s)
    logprobs, entropies = numbers(policy)
    owner = Layout(GROUPS).owners
    answers = Answers(logprobs, old, owner, ADVANTAGES, entropies, reference)
    loss = policy_loss.policy_loss(answers, Totals.of(owner, len(ADVANTAGES), MOST), s).loss
    names, parameters = zip(*policy.named_parameters(), strict=True)
    found = dict(zip(map(to_hf, names), torch.autograd.grad(loss, parameters), strict=True))
    assert loss.item() == pytest.approx(
        wanted[0], rel=1e-6, abs=1e-7
    )  # theirs and ours are sums of numbers near 1 in fp32
    whole = torch.cat([g.flatten() for g in wanted[1].values()]).norm()
    assert whole > 0
    for name, gradient in found.items():
        assert (gradient - wanted[1][name]).norm() <= 1e-6 * whole, name


@pytest.mark.peer
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_those_of_trl(name, level, peers):
    if name in ("luspo", "vespo") and level == "token":
        level = "sequence" if name == "luspo" else "token"
    clip = {"clip_low": 0.05, "clip_high": 0.08} if NAMED[name].loss == "clipped" else {}
    compared(peers, name, level, replace(NAMED[name], level=level, kl_weight=0.04, **clip))


@pytest.mark.peer
@pytest.mark.parametrize(
    "change",
    [{"kl_ratio": False}, {"two_sided": 1.2, "clip_high": 0.1}, {"entropy": 0.05}, {"entropy_share": 0.4}],
    ids=lambda change: "-".join(change),
)
def test_additions_equal_those_of_trl(change, peers):
    compared(peers, "grpo", "token", Settings(kl_weight=0.04, **change))
