from finetune.drills.cases import Case

TINY = {"layers": 1, "d": 2, "heads": 1, "kv_heads": 1, "hidden": 3, "vocabulary": 5, "tied": True}
SMALL = {"layers": 2, "d": 12, "heads": 6, "kv_heads": 2, "hidden": 20, "vocabulary": 31, "tied": False}
LLAMA_8B = {"layers": 32, "d": 4096, "heads": 32, "kv_heads": 8, "hidden": 14336, "vocabulary": 128256, "tied": False}
LLAMA_70B = {"layers": 80, "d": 8192, "heads": 64, "kv_heads": 8, "hidden": 28672, "vocabulary": 128256, "tied": False}
SMOL = {"layers": 30, "d": 576, "heads": 9, "kv_heads": 3, "hidden": 1536, "vocabulary": 49152, "tied": True}


def drive(code, what, **numbers):
    return getattr(code, what)(**numbers)


def cases(draw):
    for name, model in (
        ("a tiny model", TINY),
        ("a small model", SMALL),
        ("SmolLM2-135M", SMOL),
        ("Llama 3 8B", LLAMA_8B),
    ):
        yield Case(f"parameters of {name}", ["parameters"], model)
    yield Case("parameters of Llama 3 70B", ["parameters"], LLAMA_70B)
    for name, model in (("a tiny model", TINY), ("a small model", SMALL), ("Llama 3 8B", LLAMA_8B)):
        for context in (1, 8192):
            yield Case(f"FLOPs of {name}, {context} keys", ["forward_flops"], model | {"context": context})
    for name, model in (("a small model", SMALL), ("Llama 3 8B", LLAMA_8B), ("Llama 3 70B", LLAMA_70B)):
        cached = {key: model[key] for key in ("layers", "d", "heads", "kv_heads")}
        for tokens, batch in ((1, 1), (8192, 32)):
            at = cached | {"tokens": tokens, "batch": batch}
            yield Case(f"cache of {name}, {batch} × {tokens} tokens", ["kv_cache_bytes"], at)
    for n, gpus in ((1, 1), (7, 2), (8030261248, 8), (70553706496, 24)):
        yield Case(f"training of {n} parameters on {gpus} GPUs", ["training_bytes"], {"n": n, "gpus": gpus})
