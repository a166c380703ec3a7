"""The reference policy of a model with adapters: the same model with its adapters off.

Submodules of `model`, at any depth, have a flag `adapter_on` (bool) if they have an adapter; others do not. Every
module has PyTorch's flag `training`.

adapters_off(model): a context manager. Inside, all adapters are off and the model is in eval mode (no dropout).
Afterwards, also after an exception, both flags of every module are what they were before.
log_ratio(model, ids): model(ids), ids (b, t) int64 → logits (b, t, v). Gives (b,): the sum over the tokens ids[:, 1:]
of log π(token) − log π_ref(token), where the logits at i give the token i + 1. π is the model as it is given, with its
gradients; π_ref is the model inside adapters_off, computed without a graph (torch.no_grad). Call the model once for
each.

    >>> model = torch.nn.Embedding(2, 2)
    >>> with torch.no_grad(), adapters_off(model):
    ...     model.training
    False
    >>> model.training, log_ratio(model, torch.tensor([[0, 1]])).detach()
    (True, tensor([0.]))
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    before = [(each, each.training, getattr(each, "adapter_on", None)) for each in model.modules()]
    try:
        model.eval()
        for each, _, on in before:
            if on is not None:
                each.adapter_on = False
        yield
    finally:
        for each, training, on in before:
            each.training = training
            if on is not None:
                each.adapter_on = on


def log_ratio(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logs = log_probabilities(model(ids), ids)
    with torch.no_grad(), adapters_off(model):
        reference = log_probabilities(model(ids), ids)
    return (logs - reference).sum(1)


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
