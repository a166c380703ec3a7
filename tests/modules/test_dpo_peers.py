"""The losses of the module dpo and their gradients on a model's weights, next to those of TRL and OpenRLHF."""

import copy
import dataclasses
import types

import pytest
import small_trl
import torch
import torch.nn.functional as F

from finetune import ops
from finetune.alignment.logprobs import Reference
from finetune.data.packing import Document
from finetune.lm.io import load
from finetune.lm.io.hf_llama import to_hf
from finetune.runs import registry

dpo = registry.load(registry.find("dpo"))
data, judged, losses = (registry.part("dpo", name) for name in ("data", "judged", "losses"))

ROWS = [  # of unequal lengths, which a mean over padding would show
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 1], "rejected_ids": [11, 12, 1]},
    {"prompt_ids": [5, 6], "chosen_ids": [8, 1], "rejected_ids": [11, 12, 13, 14, 1]},
    {"prompt_ids": [20], "chosen_ids": [21, 22, 23, 9, 1], "rejected_ids": [3, 4, 5, 6, 7, 1]},
]
NAMES = {
    "sigmoid": "sigmoid", "robust": "robust", "hinge": "hinge", "ipo": "ipo", "exo": "exo_pair", "nca": "nca_pair",
    "sppo": "sppo_hard", "apo_zero": "apo_zero", "apo_down": "apo_down", "bco": "bco_pair", "aot": "aot",
    "aot_unpaired": "aot_unpaired", "discopop": "discopop", "sigmoid_norm": "sigmoid_norm",
}  # fmt: skip
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """(their trainer of pairs, our model with the same weights, our reference, their trainer of single judgments)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    folder = tmp_path_factory.mktemp("trl")
    # Near, as a reference is: e^−h of the divergences magnifies rounding.
    tokenizer, pair = small_trl.llamas(folder, 2, 0.03)
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}
    judgments = [
        {"prompt": "ab", "completion": "cd", "label": True},
        {"prompt": "a", "completion": "e", "label": False},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        single = KTOTrainer(
            *copy.deepcopy(pair),
            args=KTOConfig(per_device_train_batch_size=2, **common),
            train_dataset=Dataset.from_list(judgments),
            processing_class=tokenizer,
        )
        trainer = DPOTrainer(
            *pair,
            args=DPOConfig(use_weighting=True, **common),  # so that its forward gives what WPO needs
            train_dataset=Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "e"}]),
            processing_class=tokenizer,
        )
    trainer.use_weighting = False
    trainer.model.eval()
    single.model.eval()
    ours = [load.llama(folder / str(seed), torch.float64) for seed in (0, 1)]
    return trainer, *ours, single


def theirs(trainer, rows=None, **settings):
    """Their loss and gradients of `rows`, by default ROWS."""
    before = {name: getattr(trainer, name) for name in settings}
    vars(trainer).update(settings)
    try:
        loss = trainer._compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows or ROWS]), False)
        names, parameters = zip(*trainer.model.named_parameters(), strict=True)
        return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    finally:
        vars(trainer).update(before)


def pairs():
    def document(row, which):
        return Document(row["prompt_ids"] + row[which], [0] * len(row["prompt_ids"]) + [1] * len(row[which]))

    return [data.Pair(document(row, "chosen_ids"), document(row, "rejected_ids")) for row in ROWS]


def ours(config, policy, reference):
    policy.zero_grad(set_to_none=True)
    with ops.use_backend("reference"):
        found = dpo.accumulate_gradients(config, policy, pairs(), lambda _, rows: rows.logprobs(reference).detach())
    return found["loss"], gradients(policy)


def gradients(policy):
    return {to_hf(name): p.grad for name, p in policy.named_parameters()}


def same(found, wanted, tolerance=1e-6):
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    whole = torch.cat([g.flatten() for g in wanted[1].values()]).norm()
    for name, gradient in found[1].items():
        assert (gradient - wanted[1][name]).norm() <= tolerance * whole, name


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_those_of_trl(name, peers):
    trainer, policy, reference, _ = peers
    smoothing = 0.1 if name in ("robust", "exo", "aot", "aot_unpaired") else 0.0
    config = dpo.Config(loss=name, smoothing=smoothing, beta=0.3)
    wanted = theirs(trainer, loss_types=[NAMES[name]], label_smoothing=smoothing, beta=0.3)
    # Their log-probabilities are fp32, and discopop multiplies the margin by 20.
    same(ours(config, policy, reference), wanted, 2e-5 if name == "discopop" else 1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_equal_those_of_trl(name, peers):
    trainer, policy, reference, _ = peers
    config = dpo.Config(divergence=name, f_alpha=0.3, beta=0.3)
    wanted = theirs(trainer, f_divergence_type=DIVERGENCES[name], f_alpha_divergence_coef=0.3, beta=0.3)
    same(ours(config, policy, reference), wanted)


@pytest.mark.peer
@pytest.mark.parametrize("change", ["ld", "wpo", "sft"])
def test_additions_equal_those_of_trl(change, peers):
    trainer, policy, reference, _ = peers
    if change == "ld":
        same(ours(dpo.Config(beta=0.1, length_alpha=0.4), policy, reference), theirs(trainer, ld_alpha=0.4))
    elif change == "wpo":
        same(ours(dpo.Config(beta=0.1, weighted=True), policy, reference), theirs(trainer, use_weighting=True))
    else:  # their mean is over the batch's tokens, ours over answers: with one pair it is the same
        one = [ROWS[0]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "ROWS", one)
            wanted = theirs(trainer, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
            same(ours(dpo.Config(beta=0.1, sft_weight=0.7), policy, reference), wanted)


@pytest.mark.peer
def test_kto_and_its_gradients_equal_those_of_trl(peers):
    """Good and bad answers with unequal weights; the KL is estimated by the answer to the next prompt."""
    _, policy, reference, trainer = peers
    labels = [True, False, False]
    documents = [pair.chosen if good else pair.rejected for pair, good in zip(pairs(), labels, strict=True)]
    answers = [row["chosen_ids"] if good else row["rejected_ids"] for row, good in zip(ROWS, labels, strict=True)]
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": own, "KL_completion_ids": other, "label": good}
        for row, own, other, good in zip(ROWS, answers, answers[1:] + answers[:1], labels, strict=True)
    ]
    wanted = theirs(trainer, rows, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    assert trainer._metrics["eval"]["kl"][-1] > 0  # the estimate takes part
    config = dpo.Config(loss="kto", beta=0.3, good_weight=1.5, bad_weight=0.5)
    policy.zero_grad(set_to_none=True)
    with ops.use_backend("reference"):
        found = judged.accumulate_kto(config, policy, documents, torch.tensor(labels), Reference(reference))
    same((found["loss"], gradients(policy)), wanted)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_label_smoothing_and_sums_are_openrlhfs(name):
    """DPOLoss of openrlhf/models/loss.py, written out: its package needs flash-attn. Of (B,) sums over tokens."""

    def openrlhf(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing):
        logits = (chosen - rejected) - (reference_chosen - reference_rejected)
        if name == "ipo":
            return ((logits - 1 / (2 * beta)) ** 2).mean()
        plain, flipped = F.logsigmoid(beta * logits), F.logsigmoid(-beta * logits)
        return (-plain * (1 - label_smoothing) - flipped * label_smoothing).mean()

    g = torch.Generator().manual_seed(0)
    four = [(-9 * torch.rand(32, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    tokens = torch.randint(2, 9, (2, 32), generator=g)
    settings = losses.Settings(beta=0.3, smoothing=0.2, ipo_sum=True)
    found = losses.LOSSES[name][1](losses.Pairs(*four, *tokens), settings).mean()
    wanted = openrlhf(*four, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for ours_, theirs_ in zip(torch.autograd.grad(found, four), torch.autograd.grad(wanted, four), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-9, atol=1e-15)


@pytest.mark.peer
def test_losses_without_a_reference_equal_those_of_trl():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    g = torch.Generator().manual_seed(0)
    chosen, rejected = (-0.2 - 3 * torch.rand(32, generator=g) for _ in range(2))  # means over tokens
    tokens = torch.randint(2, 9, (32,), generator=g)
    batch = losses.Pairs(chosen * tokens, rejected * tokens, chosen, rejected, tokens, tokens)
    me = types.SimpleNamespace(beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.1,
                               accelerator=types.SimpleNamespace(device="cpu"))  # fmt: skip
    wanted = CPOTrainer.cpo_loss(me, chosen, rejected)[0]
    settings = losses.Settings(beta=2.0, gamma=0.7, smoothing=0.1)
    torch.testing.assert_close(losses.simpo(batch, settings), wanted, rtol=1e-5, atol=1e-6)
    ratio = ORPOTrainer.odds_ratio_loss(me, chosen, rejected)[0]  # which their loss subtracts
    found = losses.orpo(batch, dataclasses.replace(settings, beta=2.0))
    torch.testing.assert_close(found, -chosen - ratio, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_add_up():
    """The gradient of micro-batches is the whole batch's, with every loss that takes one pair at a time."""
    from finetune.lm.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    shape = LlamaConfig(30, dim=16, layers=1, heads=2, kv_heads=1, hidden=24, max_length=32)
    policy, reference = (Llama(shape).double() for _ in range(2))
    for name in (*losses.LOSSES, "weighted"):
        if name.startswith("aot"):
            continue
        config = dpo.Config(
            loss="sigmoid" if name == "weighted" else name, weighted=name == "weighted", sft_weight=0.5,
            length_alpha=0.5, smoothing=0.1 if name in ("exo", "robust") else 0.0,
        )  # fmt: skip
        loss, whole = ours(config, policy, reference)
        whole = {key: g.clone() for key, g in whole.items()}
        parts_loss, parts = ours(dataclasses.replace(config, accumulate=3), policy, reference)
        assert parts_loss == pytest.approx(loss, rel=1e-9)
        for key, g in parts.items():
            torch.testing.assert_close(g, whole[key], rtol=1e-9, atol=1e-12)


def test_prompts_carry_no_gradient():
    """No loss is differentiated at the place of a prompt's token; the places that predict an answer all are."""
    from finetune.lm.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    model = Llama(LlamaConfig(30, dim=16, layers=1, heads=2, kv_heads=1, hidden=24, max_length=32))
    rows = dpo.collate(pairs())
    seen = []

    class Watched:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            return getattr(self.model, name)

        def __call__(self, *args, **given):
            hidden = self.model(*args, **given).detach().requires_grad_()
            seen.append(hidden)
            return hidden

    dpo.pair_losses(dpo.Config(), Watched(model), rows, torch.zeros(len(rows.targets)))[0].sum().backward()
    read = torch.zeros(rows.tokens, dtype=torch.bool)
    read[rows.rows] = True
    assert not seen[0].grad[0][~read].any()
    assert seen[0].grad[0][read].abs().sum(-1).all()
    assert (~read).sum() == sum(len(row["prompt_ids"]) - 1 for row in ROWS)  # the last one predicts both answers


def test_collated_pairs_keep_their_order():
    assert dpo.collate(pairs()).lengths.tolist() == [4, 3, 2, 5, 5, 6]
