"""Samples of a run: held-out questions, and the answers of the model to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data import conversations
from finetune.data.packing import Document
from finetune.inference.generate import generate
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer, answer_text, stop_ids
from finetune.runs.run import Run


@dataclass(frozen=True)
class Question:
    """A question, the conversation up to it as tokens, and the answer of the data."""

    text: str
    prompt: list[int]
    wanted: str


def choose(documents: Sequence[Document], count: int, tokenizer: Tokenizer, model: Llama, run: Run) -> list[Question]:
    """The last exchange of each of the first `count` documents that have one and whose prompt fits the model."""
    found: list[Question] = []
    for document in documents:
        if len(found) == count:
            break
        row = document.row or []
        for i in conversations.exchanges(row):
            prompt = tokenizer.encode(tokenizer.render_text(row[:i], add_generation_prompt=True)[0], False)
            if len(prompt) < model.config.max_length:
                asked = next((m["content"] for m in reversed(row[:i]) if m["role"] == "user"), "")
                found.append(Question(asked, prompt, row[i]["content"]))
                break
    if len(found) < count:
        run.print(f"--samples {count}: only {len(found)} held-out rows have an answer to a question that fits")
    return found


def answers(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int = 64) -> list[str]:
    """The model's greedy answers."""
    if not questions:
        return []
    prompts = [question.prompt for question in questions]
    room = model.config.max_length - max(map(len, prompts))
    stops = stop_ids(model, tokenizer)
    model.eval()
    new = generate(model, prompts, min(max_new_tokens, room), stop_ids=stops)
    model.train()
    return [answer_text(tokenizer, ids, stops) for ids in new]
