"""The reference of the toys: a small Llama that has learned to write sentences of random words (openings.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from finetune import optim
from finetune.alignment import openings, preferences
from finetune.data import packing
from finetune.data.packing import Document
from finetune.lm import head
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs.run import Run


def toy_tokenizer() -> Tokenizer:
    texts = openings.toy_openings()
    sentences = openings.toy_sentences(texts, random.Random(0))
    return Tokenizer.train([a + b for a, b in zip(texts, sentences, strict=True)], 512)


def toy_documents(tokenizer: Tokenizer, prompts: Sequence[str], rng: random.Random) -> list[Document]:
    """The openings `prompts`, each with a sentence of random words as the answer that is learned."""
    sentences = openings.toy_sentences(prompts, rng)
    return [preferences.document(tokenizer, one, other) for one, other in zip(prompts, sentences, strict=True)]


def learn_to_write(run: Run, model: Llama, tokenizer: Tokenizer, steps: int) -> None:
    """Supervised fine-tuning of `model` on such sentences, in place; a phase of the run."""
    texts = openings.toy_openings()
    imitate(run, model, steps, lambda rng: toy_documents(tokenizer, rng.sample(texts, 48), rng))


def imitate(run: Run, model: Llama, steps: int, documents: Callable[[random.Random], Sequence[Document]]) -> None:
    """Supervised fine-tuning of a toy's model on the documents of each step, in place: the phase "sft" of the run."""
    optimizer = optim.AdamW(optim.decay_groups(model.parameters(), 0.0), lr=3e-3)
    state = {"model": dict(model.named_parameters()), "optimizer": optimizer}
    for step in run.steps(steps, state, phase="sft"):
        batch = packing.collate(documents(random.Random(f"{run.cfg.seed} {step}")))
        hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)
        loss = head.cross_entropy(model, hidden[0], batch.targets[0])
        loss.backward()
        optimizer.step(lr=optim.cosine(step, steps, 10, 3e-3, 3e-4))
        optimizer.zero_grad()
        run.log(step, sft_loss=loss)
