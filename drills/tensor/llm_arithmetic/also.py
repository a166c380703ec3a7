import math


def blocks(d, heads, kv_heads, hidden):
    width = d // heads
    return [(d, heads * width), (d, kv_heads * width), (d, kv_heads * width), (heads * width, d)] + [(d, hidden)] * 3


def parameters(layers, d, heads, kv_heads, hidden, vocabulary, tied):
    total = d
    for _ in range(layers):
        total += sum(a * b for a, b in blocks(d, heads, kv_heads, hidden)) + d + d
    total += vocabulary * d
    return total if tied else total + vocabulary * d


def forward_flops(layers, d, heads, kv_heads, hidden, vocabulary, tied, context):
    untied = parameters(layers, d, heads, kv_heads, hidden, vocabulary, True) - (2 * layers + 1) * d
    return 2 * untied + 4 * layers * heads * (d // heads) * context


def kv_cache_bytes(layers, d, heads, kv_heads, tokens, batch):
    a_token = layers * kv_heads * (d // heads) * (2 + 2)
    return a_token * tokens * batch


def training_bytes(n, gpus):
    return 16 * math.ceil(n / gpus)
