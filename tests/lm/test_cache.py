"""The contiguous key–value cache: a pass in pieces, rows of unequal length."""

import copy

import pytest
import torch
from small_lms import model as model

from finetune.errors import UserError
from finetune.lm.cache import KVCache
from finetune.ops import use_backend


@torch.no_grad()
def test_cached_logits_in_pieces(model):
    row = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(0))
    wanted, cache, found = model(row), KVCache(model, 2, 30), []
    for piece in row.split([11, 1, 1, 9, 1, 7], dim=1):
        found.append(model(piece, cache=cache))
    exact = copy.deepcopy(model).double()
    with use_backend("reference"):
        right = exact(row)
    error = [(logits.double() - right).abs().max().item() for logits in (torch.cat(found, 1), wanted)]
    assert error[0] <= 2 * error[1] + torch.finfo(torch.float32).eps * right.abs().max().item()
    config = model.config
    assert cache.nbytes == 2 * config.layers * config.kv_heads * config.head_dim * 4 * 2 * 30
    assert cache.lengths.tolist() == [30, 30]
    with pytest.raises(UserError, match="31 tokens do not fit the cache of 30"):
        model(row[:, :1], cache=cache)


@torch.no_grad()
def test_uneven_cache_takes_one_token_at_a_time(model):
    cache = KVCache(model, 2, 20)
    model(torch.ones(2, 5, dtype=torch.int64), lengths=torch.tensor([5, 3]), cache=cache)
    assert cache.lengths.tolist() == [5, 3]
    with pytest.raises(UserError, match="equally long"):
        model(torch.ones(2, 2, dtype=torch.int64), cache=cache)
