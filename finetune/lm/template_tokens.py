"""A chat template given to a model that has another or none (--template), and the embeddings of the tokens it needs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.errors import UserError, nearest
from finetune.lm.chat_template import TEMPLATES
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import reading

NAMED = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")  # tokens that a template's text has in its quotes
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def file_of(template: str) -> Path | None:
    """The file that --template names; None for a name of TEMPLATES. UserError if it is neither."""
    if template in TEMPLATES:
        return None
    path = reading.home_path(template)
    if not path.is_file():
        hint = nearest(template, TEMPLATES)
        raise UserError(f"--template {template}: there is no such file, and the names are {', '.join(TEMPLATES)}{hint}")
    return path


def adopt(tokenizer: Tokenizer, template: str) -> tuple[list[str], list[str]]:
    """Gives the tokenizer the template of a name or file, and its end token. Returns the tokens that the template
    writes, and those of them that were added to the vocabulary: the model needs embeddings for them (`embed`).

    UserError if the template does not end an answer with a token: the model would never stop.
    """
    file = file_of(template)
    source = TEMPLATES[template].source if file is None else reading.text_file(file, limit=4 << 20)
    if "eos_token" in source and tokenizer.eos is None:
        raise UserError(f"--template {template} ends answers with eos_token, and the model has none: choose chatml")
    tokenizer.chat_template = source
    if file is None:
        names = list(TEMPLATES[template].tokens)
    else:  # one that stands in the source may be in a comment: what is written decides
        written = tokenizer.render_text(PROBE)[0] + tokenizer.render_text(PROBE[:1], add_generation_prompt=True)[0]
        names = list(dict.fromkeys(name for name in NAMED.findall(source) if name in written))
    added = [name for name in names if tokenizer.backend.token_to_id(name) is None]
    tokenizer.backend.add_special_tokens(added)
    tokenizer.chat_template = source  # a new renderer, which knows the added tokens
    ids, mask, _ = tokenizer.documents(PROBE)[-1]
    last = max((i for i, learned in enumerate(mask) if learned), default=-1)
    known = tokenizer.backend.get_added_tokens_decoder()
    if last < 0 or ids[last] not in known:
        raise UserError(
            f"--template {template}: no token ends an answer, so the model would never stop: "
            "write {{ eos_token }} behind it"
        )
    tokenizer.eos, tokenizer.eos_id = known[ids[last]].content, ids[last]
    tokenizer.chat_template = source  # a new renderer again: a template may write eos_token
    return names, added


@torch.no_grad()
def embed(model: Llama, tokenizer: Tokenizer, names: list[str], added: list[str]) -> list[str]:
    """Gives the model embeddings, and rows of the output projection, for those of a template's tokens that it has not
    learned: the mean of the rows of the pieces that the token's text has; of an end token the row of the model's own.

    `names`, `added`: what `adopt` returned. A token of the vocabulary counts as not learned if its row is nearly 0, as
    that of a reserved token. Returns these tokens: their rows have to be trained.
    """
    ids = {name: i for name in names if (i := tokenizer.backend.token_to_id(name)) is not None}
    lengths = model.embed.weight.float().norm(dim=1)
    least = 0.01 * lengths.median()
    fresh = [name for name, i in ids.items() if name in added or i >= len(lengths) or lengths[i] < least]
    if not fresh:
        return []
    size = max(model.config.vocab_size, max(ids.values()) + 1)
    ends = [i for i in listed(model.token_ids.get("eos_token_id")) if i < len(lengths) and lengths[i] >= least]
    sources = {
        ids[name]: ends[:1] if ends and name == tokenizer.eos else pieces_of(tokenizer, name, ids[name])
        for name in fresh
    }
    tables: list[nn.Embedding | nn.Linear] = [model.embed] if model.config.tied else [model.embed, model.head]
    for table in tables:
        table.weight = nn.Parameter(grown(table.weight, size, sources), requires_grad=table.weight.requires_grad)
    model.embed.num_embeddings = size
    if not model.config.tied:
        model.head.out_features = size
    model.config = replace(model.config, vocab_size=size)
    return fresh


def grown(weight: Tensor, size: int, sources: dict[int, list[int]]) -> Tensor:
    """(size, C): the rows of weight (V, C), and for each id of `sources` the mean of these rows."""
    found = torch.cat([weight, weight.mean(0, keepdim=True).expand(size - len(weight), -1)])
    for i, pieces in sources.items():
        found[i] = weight[pieces].float().mean(0).to(weight.dtype)
    return found


def pieces_of(tokenizer: Tokenizer, token: str, i: int) -> list[int]:
    """The ids of an added token's name read as text."""
    spelled = [j for part in re.findall(r"\w+|\W+", token) for j in tokenizer.encode(part, add_special_tokens=False)]
    return [j for j in spelled if j != i] or [0]


def end_ids(model: Llama, tokenizer: Tokenizer) -> None:
    """Puts the tokenizer's end token first among those of the model's files, so that other tools stop there too."""
    if tokenizer.eos_id is None:
        return
    for ids in (model.token_ids, model.generation_ids):
        if ids is model.token_ids or "eos_token_id" in ids:
            others = [i for i in listed(ids.get("eos_token_id")) if i != tokenizer.eos_id]
            ids["eos_token_id"] = [tokenizer.eos_id, *others] if others else tokenizer.eos_id


def listed(ids: int | list[int] | None) -> list[int]:
    """The ids of an eos_token_id, which may be one, several or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
