"""A small random Llama and GPT whose distributions are far from even: `from small_lms import model`, a fixture."""

import pytest
import torch

from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.llama import Llama, LlamaConfig


@pytest.fixture(scope="module", params=["llama", "gpt"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        model = Llama(LlamaConfig(vocab_size=97, dim=48, layers=3, heads=6, kv_heads=2, hidden=80, max_length=64))
    else:
        model = GPT(GPTConfig(vocab_size=97, dim=48, layers=3, heads=4, max_length=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight"))
    return model
