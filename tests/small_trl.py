"""What tests next to TRL's trainers share: a tokenizer of letters, and small random Llamas in folders."""

import copy

import torch


def llamas(folder, count, noise):
    """(a tokenizer of transformers, `count` Llamas of transformers in fp64, which are in folder/0, folder/1, …). The
    first is random, each of the others is the first with noise of this size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    shape = LlamaConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    found = [LlamaForCausalLM(shape).double()]
    for _ in range(count - 1):
        found.append(copy.deepcopy(found[0]))
        for parameter in found[-1].parameters():
            parameter.data += noise * torch.randn_like(parameter)
    for i, model in enumerate(found):
        model.save_pretrained(folder / str(i))
    return tokenizer, found
