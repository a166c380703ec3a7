"""Weights of a DiT in the names of others: of diffusers' DiTTransformer2DModel, and of the paper's own code.

Both hold the same numbers in another form: a convolution over patches, and in diffusers q, k and v apart and a copy of
the embedders of time and label in every block. A DiT has one for all blocks, so copies that differ are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import weights
from finetune.runs import checkpoint, reading

from .model import DiT, DiTConfig, positions

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Ours → theirs.
ENDS = {"embed": "pos_embed.proj", "condition": "proj_out_1", "head": "proj_out_2"}
BLOCK = {"condition": "norm1.linear", "o": "attn1.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2"}
EMBEDDERS = {"time.0": "timestep_embedder.linear_1", "time.2": "timestep_embedder.linear_2"}
LABELS = "class_embedder.embedding_table.weight"
PAPER = {"embed": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2",
         "condition": "final_layer.adaLN_modulation.1", "head": "final_layer.linear"}  # fmt: skip
PAPER_BLOCK = {"condition": "adaLN_modulation.1", "qkv": "attn.qkv", "o": "attn.proj", "up": "mlp.fc1",
               "down": "mlp.fc2"}  # fmt: skip


class Transformer(msgspec.Struct):
    """config.json of a DiTTransformer2DModel; the defaults are diffusers'. A DiT can have no other value of those below
    the line."""

    num_attention_heads: reading.Count = 16
    attention_head_dim: reading.Count = 72
    in_channels: reading.Count = 4
    out_channels: reading.Count | None = None
    num_layers: reading.Count = 28
    sample_size: reading.Count = 32
    patch_size: reading.Count = 2
    num_embeds_ada_norm: reading.Count | None = 1000
    frequency_shift: reading.Index = 1  # this project's own: diffusers has no other than 1
    # ---
    norm_eps: float = 1e-5  # of a block's second norm; all other norms have 1e-6
    activation_fn: str = "gelu-approximate"
    attention_bias: bool = True
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    dropout: float = 0.0

    def config(self, where: str) -> DiTConfig:
        """UserError names what a DiT does not have."""
        plain = Transformer(norm_eps=1e-6)
        for name in ("norm_eps", "activation_fn", "attention_bias", "norm_type", "norm_elementwise_affine", "dropout"):
            if getattr(self, name) != getattr(plain, name):
                raise UserError(f"{where}: {name} is {getattr(self, name)!r}; a DiT has {getattr(plain, name)!r}")
        outputs = self.out_channels or self.in_channels
        if outputs not in (self.in_channels, 2 * self.in_channels):
            raise UserError(f"{where}: out_channels is {outputs}; a DiT of {self.in_channels} channels has as many, "
                            "or twice as many")  # fmt: skip
        return DiTConfig(
            self.sample_size, self.in_channels, self.patch_size, self.num_attention_heads * self.attention_head_dim,
            self.num_layers, self.num_attention_heads, self.num_embeds_ada_norm or 1, outputs > self.in_channels,
            self.frequency_shift,
        )  # fmt: skip


def both(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{a}.{part}", f"{b}.{part}") for a, b in names.items() for part in ("weight", "bias")]


def to_diffusers(model: DiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a DiTTransformer2DModel that computes the same."""
    c, ours = model.config, {name: p.detach() for name, p in model.named_parameters()}
    config = Transformer(
        c.heads, c.dim // c.heads, c.channels, c.outputs, c.layers, c.side, c.patch, c.classes, c.frequency_shift, 1e-6
    )
    theirs = {b: ours[a] for a, b in both(ENDS)}
    convolution = (c.dim, c.channels, c.patch, c.patch)
    theirs["pos_embed.proj.weight"] = theirs["pos_embed.proj.weight"].reshape(convolution)
    for i in range(c.layers):
        of, to = f"blocks.{i}", f"transformer_blocks.{i}"
        theirs |= {f"{to}.{b}": ours[f"{of}.{a}"] for a, b in both(BLOCK)}
        for part in ("weight", "bias"):
            for name, each in zip("qkv", ours[f"{of}.qkv.{part}"].chunk(3), strict=True):
                theirs[f"{to}.attn1.to_{name}.{part}"] = each
        theirs |= {f"{to}.norm1.emb.{b}": ours[a] for a, b in both(EMBEDDERS)}
        theirs[f"{to}.norm1.emb.{LABELS}"] = ours["labels.weight"]
    raw = {"_class_name": "DiTTransformer2DModel", **msgspec.to_builtins(config)}
    if c.frequency_shift == 1:
        del raw["frequency_shift"]  # diffusers would warn of a key that it does not know
    return raw, {name: t.clone() for name, t in theirs.items()}


def from_diffusers(raw: dict[str, Any], theirs: dict[str, Tensor], where: str = "the model") -> DiT:
    """The DiT of a DiTTransformer2DModel. UserError names what a DiT does not have."""
    config = reading.convert(raw, Transformer, where).config(where)
    left = dict(theirs)
    blocks = {name.split(".")[1] for name in theirs if name.startswith("transformer_blocks.")}
    if len(blocks) != config.layers:
        raise UserError(f"{where}: num_layers is {config.layers}, the weights have {len(blocks)} blocks")
    ours = {a: left.pop(b, None) for a, b in both(ENDS)}
    for i in range(config.layers):
        to, of = f"blocks.{i}", f"transformer_blocks.{i}"
        ours |= {f"{to}.{a}": left.pop(f"{of}.{b}", None) for a, b in both(BLOCK)}
        for part in ("weight", "bias"):
            qkv = [t for name in "qkv" if (t := left.pop(f"{of}.attn1.to_{name}.{part}", None)) is not None]
            ours[f"{to}.qkv.{part}"] = torch.cat(qkv) if len(qkv) == 3 else None
        for a, b in (*both(EMBEDDERS), ("labels.weight", LABELS)):
            copy = left.pop(f"{of}.norm1.emb.{b}", None)
            first = ours.setdefault(a, copy)
            if copy is not None and first is not None and not torch.equal(copy, first):
                raise UserError(f"{where}: block {i} has another {b} than block 0, but a DiT has one for all blocks")
    return filled(config, ours, left, where)


def from_paper(theirs: dict[str, Tensor], config: DiTConfig, where: str = "the checkpoint") -> DiT:
    """The DiT of a state dict of the paper's code (facebookresearch/DiT), whose frequency_shift is 0."""
    if config.frequency_shift:
        raise UserError(f"{where}: weights of the paper's code need frequency_shift 0, not {config.frequency_shift}")
    left = {name: t for name, t in theirs.items() if name != "pos_embed"}
    ours = {a: left.pop(b, None) for a, b in both(PAPER)}
    ours["labels.weight"] = left.pop("y_embedder.embedding_table.weight", None)
    for i in range(config.layers):
        ours |= {f"blocks.{i}.{a}": left.pop(f"blocks.{i}.{b}", None) for a, b in both(PAPER_BLOCK)}
    return filled(config, ours, left, where)


def filled(config: DiTConfig, ours: dict[str, Tensor | None], left: dict[str, Tensor], where: str) -> DiT:
    """A DiT with these weights. UserError for those that are missing, left over, of another shape or not finite."""
    if left:
        raise UserError(f"{where}: tensor {min(left)} does not belong to a DiT of {config.layers} layers")
    dtype = next((t.dtype for t in ours.values() if t is not None), torch.float32)
    with torch.device("meta"):  # the shapes are compared before anything of their size is made
        model = DiT(config)
    given = {name: t for name, t in ours.items() if t is not None}
    if "embed.weight" in given and given["embed.weight"].dim() == 4:
        given["embed.weight"] = given["embed.weight"].flatten(1)
    weights.fill(model, given.items(), dtype, where)
    model.positions = positions(config.dim, config.side // config.patch)
    return model.to(dtype)


def save(model: DiT, folder: Path) -> None:
    """A folder that DiTTransformer2DModel.from_pretrained opens; each file whole or not at all."""
    raw, tensors = to_diffusers(model)
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", raw)
    checkpoint.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def load(folder: Path) -> DiT:
    """The DiT in a folder that `save` or diffusers wrote. UserError names the file that cannot be read."""
    raw = reading.json_file(folder / "config.json", dict[str, Any])
    tensors = {name: t.clone() for name, t in weights.read_safetensors(folder, WEIGHTS)}
    return from_diffusers(raw, tensors, str(folder))
