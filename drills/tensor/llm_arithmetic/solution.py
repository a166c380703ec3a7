"""The numbers of a Llama-like model: parameters, FLOPs, cache, training memory. All results are integers.

A model has `layers` layers; each has attention without biases (queries of `heads` heads, keys and values of `kv_heads`
heads, each head d / heads wide, and the output matrix), a SwiGLU layer (three matrices d × hidden) and two RMSNorms; a
third RMSNorm stands at the end. The embedding is vocabulary × d, and the output matrix is either another one of that
size or, if tied, the embedding itself.

parameters: the number of weights.

forward_flops: of the matrix products for one token of a forward pass, 2 for each multiply-add: every matrix that the
token goes through (the output matrix too; looking up an embedding costs nothing), and, in all heads, the scores with
`context` keys and the weighted sum of as many values.

kv_cache_bytes: of `batch` sequences of `tokens` tokens, in numbers of 2 bytes.

training_bytes: on each of `gpus` GPUs, for n parameters with ZeRO-3 and AdamW. A GPU holds ⌈n / gpus⌉ parameters, each
with its weight and gradient in bf16, and weight and both moments in fp32. Activations are not counted.

    >>> parameters(layers=32, d=4096, heads=32, kv_heads=8, hidden=14336, vocabulary=128256, tied=False)
    8030261248
    >>> kv_cache_bytes(layers=32, d=4096, heads=32, kv_heads=8, tokens=8192, batch=1) / 2**30
    1.0
"""


def parameters(layers: int, d: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, tied: bool) -> int:
    matrices = layer_matrices(d, heads, kv_heads, hidden)
    return layers * (matrices + 2 * d) + d + vocabulary * d * (1 if tied else 2)


def forward_flops(
    layers: int, d: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, tied: bool, context: int
) -> int:
    attention = 2 * context * d  # multiply-adds: scores, and weighted values, all heads together
    return 2 * (layers * (layer_matrices(d, heads, kv_heads, hidden) + attention) + vocabulary * d)


def kv_cache_bytes(layers: int, d: int, heads: int, kv_heads: int, tokens: int, batch: int) -> int:
    return 2 * layers * kv_heads * (d // heads) * tokens * batch * 2


def training_bytes(n: int, gpus: int) -> int:
    return -(-n // gpus) * (2 + 2 + 4 + 4 + 4)


def layer_matrices(d: int, heads: int, kv_heads: int, hidden: int) -> int:
    return 2 * d * d + 2 * d * kv_heads * (d // heads) + 3 * d * hidden
