"""Log-probabilities of answers against the plain computation, and the three ways to a reference."""

import pytest
import torch
import torch.nn.functional as F

from finetune.alignment import logprobs
from finetune.alignment.logprobs import Reference
from finetune.data.packing import Document, collate
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import lora

CONFIG = LlamaConfig(vocab_size=50, dim=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, max_length=64)


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG)


def some_documents(count: int = 5) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        ids = torch.randint(50, (6 + 3 * i,), generator=generator).tolist()
        found.append(Document(ids, [0] * (2 + i) + [1] * (len(ids) - 2 - i)))
    return found


def plain(model: Llama, document: Document, temperature: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([list(document.ids)]))[0, :-1].float() / temperature
    targets = torch.tensor(document.ids[1:])
    found = -F.cross_entropy(logits, targets, reduction="none")
    return found[torch.tensor(document.mask[1:]).bool()]


@pytest.mark.parametrize("chunk", [1 << 24, 50 * 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(model: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float):
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    documents = some_documents()
    batch = collate(documents)
    found = logprobs.token_logprobs(model, batch, temperature)
    wanted = torch.cat([plain(model, d, temperature) for d in documents])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    sums = logprobs.sequence_sums(found, batch)
    assert logprobs.lengths(batch).tolist() == [d.learned for d in documents]
    weights = torch.arange(1.0, 6.0)
    (sums * weights).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.stack(
        [w * plain(model, d, temperature).sum() for w, d in zip(weights, documents, strict=True)]
    ).sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


def test_entropies(model: Llama):
    documents = some_documents(2)
    _, entropies = logprobs.with_entropies(model, collate(documents))
    wanted = []
    for d in documents:
        p = model(torch.tensor([list(d.ids)]))[0, :-1].float().log_softmax(-1)
        wanted.append(-(p.exp() * p).sum(-1)[torch.tensor(d.mask[1:]).bool()])
    torch.testing.assert_close(entropies, torch.cat(wanted), rtol=1e-5, atol=1e-5)


def test_prompt_tokens_carry_no_gradient(model: Llama):
    """Only through attention: the loss does not ask for a prompt's next tokens."""
    document = Document([1, 2, 3, 4], [0, 0, 0, 1])
    assert logprobs.token_logprobs(model, collate([document])).shape == (1,)


def trained(model: Llama, lr: float = 0.5) -> None:
    """A few steps, so that the policy is no longer the reference."""
    batch = collate(some_documents())
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        grads = torch.autograd.grad(logprobs.token_logprobs(model, batch).mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += lr * g


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_three_references_give_the_same(model: Llama, dropout: float):
    documents = some_documents()
    batch = collate(documents)
    copy = Reference(model)
    assert not copy.trained
    before = logprobs.token_logprobs(model, batch).detach()
    lora.apply_lora(model, rank=4, dropout=dropout, generator=torch.Generator().manual_seed(0))
    switched = Reference(model)
    assert switched.trained == {"default"}
    precomputed = torch.cat(switched.precomputed(documents, tokens=20))
    model.train()
    trained(model)
    assert (logprobs.token_logprobs(model, batch) - before).abs().max() > 0.01
    for reference in (copy.token_logprobs(batch), switched.token_logprobs(batch), precomputed):
        torch.testing.assert_close(reference, before, rtol=0, atol=1e-6)
    assert model.training
    assert all(layer.active == {"default": 1.0} for _, layer in lora.adapters(model))


def test_a_copy_does_not_follow(model: Llama):
    reference = Reference(model)
    batch = collate(some_documents())
    before = reference.token_logprobs(batch)
    trained(model)
    assert torch.equal(reference.token_logprobs(batch), before)
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_chunks_hold_every_document_once():
    documents = some_documents(9)
    parts = [list(part) for part in logprobs.chunks(documents, 40)]
    assert [d for part in parts for d in part] == documents
    assert all(sum(map(len, part)) <= 40 or len(part) == 1 for part in parts)
    assert list(logprobs.chunks([], 40)) == []


def test_an_earlier_adapter_still_counts(model: Llama):
    """SFT with an adapter, then preferences with a second one: the reference is the model after SFT."""
    batch = collate(some_documents())
    lora.apply_lora(model, rank=4, name="sft", generator=torch.Generator().manual_seed(0))
    trained(model)
    for _, layer in lora.adapters(model):
        layer.part("sft").requires_grad_(False)
    after_sft = logprobs.token_logprobs(model, batch).detach()
    lora.apply_lora(model, rank=2, name="default", generator=torch.Generator().manual_seed(1))
    lora.activate(model, {"sft": 1.0, "default": 1.0})
    reference = Reference(model)
    assert reference.trained == {"default"}
    trained(model)
    torch.testing.assert_close(reference.token_logprobs(batch), after_sft, rtol=0, atol=1e-6)
    assert (logprobs.token_logprobs(model, batch) - after_sft).abs().max() > 0.01


def test_modules_that_are_trained_whole_return(model: Llama):
    batch = collate(some_documents())
    before = logprobs.token_logprobs(model, batch).detach()
    lora.apply_lora(model, rank=4, generator=torch.Generator().manual_seed(0))
    lora.train_modules(model, ["norm"])
    reference = Reference(model)
    trained(model)
    torch.testing.assert_close(reference.token_logprobs(batch), before, rtol=0, atol=1e-6)
    assert (logprobs.token_logprobs(model, batch) - before).abs().max() > 0.01
