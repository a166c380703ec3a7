"""A trained model that answers questions about image files: what `python -m finetune generate --image` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.data.image_files import open_image
from finetune.data.image_rows import PLACEHOLDER
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.lm.tokenizer import answer_text, stop_ids
from finetune.vision import preprocess

from . import files
from .data import SIGN, Writer


class Seer:
    """The model, tokenizer and preprocessing of a folder, which `files.write` or transformers wrote."""

    def __init__(self, folder: Path) -> None:
        self.net = files.read(folder).eval()
        self.tokenizer = load.tokenizer(folder)
        self.preprocess = preprocess.load(folder)
        self.writer = Writer(self.tokenizer, self.net.config.image_token, self.net.config.each)

    def ids(self, prompt: str, images: int, chat: bool | None = None, system: str | None = None) -> list[int]:
        """The tokens of a prompt; its images stand where it says `<image>`, else before it."""
        if SIGN in prompt:
            raise UserError("the prompt has the character U+FDD0, which no text has: remove it")
        if PLACEHOLDER not in prompt:
            prompt = f"{PLACEHOLDER}\n" * images + prompt
        if (named := prompt.count(PLACEHOLDER)) != images:
            raise UserError(f"the prompt names {named} images ({PLACEHOLDER}), {images} are given with --image")
        content = prompt.replace(PLACEHOLDER, SIGN)
        if chat is False or not self.tokenizer.chat_template:
            if chat or system is not None:
                raise UserError("the model has no chat template" if chat is not False else "--system needs --chat")
            return self.writer.encode(content, [])[0]
        before = [] if system is None else [{"role": "system", "content": system}]
        return self.writer.prompt([*before, {"role": "user", "content": content}])

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[str],
        images: Sequence[str | Path],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool | None = None,
        system: str | None = None,
    ) -> list[str]:
        """The answer to each prompt about all the images, which are encoded once. UserError names a broken image."""
        rows = [self.ids(prompt, len(images), chat, system) for prompt in prompts]
        pixels = self.preprocess.batch([open_image(Path(image)) for image in images])
        vectors = self.net.project(pixels).repeat(len(rows), 1, 1)
        stops = stop_ids(self.net.language, self.tokenizer)
        random: Any = torch.Generator().manual_seed(seed)
        new = self.net.generate(rows, vectors, max_new_tokens, stops, temperature, random)
        return [answer_text(self.tokenizer, ids, stops) for ids in new]
