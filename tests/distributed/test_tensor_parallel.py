"""Layers split over ranks: against the whole layer in one process, megatron-core and torch's parallelize_module."""

import on_ranks
import pytest
import torch
import torch.nn.functional as F

G = torch.Generator().manual_seed(0)


def numbers(*shape):
    return torch.randn(*shape, generator=G)


def case(hidden=13):
    return numbers(2, 8, 6), numbers(hidden, 6), numbers(hidden), numbers(6, hidden)


def whole(x, weight, bias, down):
    x, weight, bias, down = (t.clone().requires_grad_() for t in (x, weight, bias, down))
    y = F.linear(torch.tanh(F.linear(x, weight, bias)), down)
    y.square().sum().backward()
    return y.detach(), x.grad, weight.grad, bias.grad, down.grad


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_column_and_row_layers_equal_the_whole_ones(two):
    """13 hidden units over 2 ranks: 7 and 6."""
    given = case()
    y, dx, dw, db, dd = whole(*given)
    answers = two.call(on_ranks.layers, *given)
    for sequence in (False, True):
        found = [answer[0][sequence] for answer in answers]
        close(torch.cat([f[2] for f in found]), dw)
        close(torch.cat([f[3] for f in found]), db)
        close(torch.cat([f[4] for f in found], 1), dd)
        for i, expected in ((0, y), (1, dx)):
            close(torch.cat([f[i] for f in found], 1) if sequence else found[0][i], expected)
            close(found[-1][i], expected.chunk(2, 1)[1] if sequence else expected)
    x, weight, bias = (t.clone().requires_grad_() for t in given[:3])
    expected = F.linear(x, weight, bias)
    expected.square().sum().backward()
    for _, (joined, grad, _) in answers:
        close(joined, expected.detach())
        close(grad, x.grad)
    close(torch.cat([answer[1][2] for answer in answers]), weight.grad)


@pytest.mark.parametrize("vocabulary", [257, 8, 5])
def test_cross_entropy_of_a_shared_vocabulary(four, vocabulary):
    """257 columns over 4 ranks; logits of thousands; ignored targets; three all-reduces."""
    logits, targets = numbers(9, vocabulary) * 1000, torch.randint(vocabulary, (9,), generator=G)
    targets[2] = -100
    x = logits.clone().requires_grad_()
    expected = F.cross_entropy(x, targets, ignore_index=-100, reduction="none")
    (expected * torch.arange(1.0, 10)).sum().backward()
    answers = four.call(on_ranks.cross_entropies, logits, targets)
    for loss, _, calls in answers:
        close(loss, expected.detach())
        assert calls == {("all_reduce", "tp"): 3}
    close(torch.cat([grad for _, grad, _ in answers], 1), x.grad)


def test_embedding_of_a_shared_vocabulary(two):
    weight, tokens = numbers(37, 6), torch.randint(37, (2, 8), generator=G)
    table = weight.clone().requires_grad_()
    expected = F.embedding(tokens, table)
    expected.square().sum().backward()
    (first, first_sequence), (second, second_sequence) = two.call(on_ranks.embeddings, weight, tokens)
    close(first[0], expected.detach())
    close(torch.cat([first_sequence[0], second_sequence[0]], 1), expected.detach())
    for a, b in ((first, second), (first_sequence, second_sequence)):
        close(torch.cat([a[1], b[1]]), table.grad)


@pytest.mark.peer
def test_layers_equal_megatron_core_and_parallelize_module(two):
    pytest.importorskip("megatron.core")
    given = case(hidden=12)
    ours = [answer[0][False] for answer in two.call(on_ranks.layers, *given)]
    for peer in (on_ranks.megatron_layers, on_ranks.torch_layers):
        for mine, theirs in zip(ours, two.call(peer, *given), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                close(a, b)


@pytest.mark.peer
def test_cross_entropy_equals_megatron_core(two):
    pytest.importorskip("megatron.core")
    logits, targets = numbers(9, 40) * 5, torch.randint(40, (9,), generator=G)
    ours = two.call(on_ranks.cross_entropies, logits, targets)
    theirs = two.call(on_ranks.megatron_cross_entropy, logits, targets)
    for (loss, grad, _), (their_loss, their_grad) in zip(ours, theirs, strict=True):
        close(loss, their_loss)
        close(grad, their_grad)
