"""What an adapter folder holds of whole modules (`modules_to_save`, a resized vocabulary, trained tokens, LoRA of an
embedding, biases), checked against a model and put on it as modules of the adapter (finetune/peft/whole.py)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.lm.llama import Llama
from finetune.peft import whole
from finetune.peft.lora import LoRALinear, first_fit
from finetune.peft.quantize import FrozenLinear
from finetune.peft.whole import hf_module

if TYPE_CHECKING:
    from finetune.peft.adapters import LoRAConfig

TABLES = ("embed", "head")  # the modules with a row for each token


class Modules:
    """The whole modules of an adapter folder.

    `others`: its tensors that are not LoRA's, by module and `adapters.OTHERS`. `values`: what the modules get, by
    module and parameter. Embedding and head of a tied model change together (`joint`) if the adapter holds the same for
    both or has trained tokens of the embedding; else the model gets a head of its own, as peft's.
    """

    def __init__(
        self, model: nn.Module, folder: Path, config: LoRAConfig, others: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        whole.swap(model, ())
        self.model, self.folder, self.config = model, folder, config
        self.tied = isinstance(model, Llama) and whole.shared(model)
        self.joint, self.only_read = False, ""  # only_read: what cannot be trained further
        self.values: dict[str, dict[str, Tensor]] = {}
        for name in config.modules_to_save or ():
            if not any("weight" in parts and self.is_named(at, name) for at, parts in others.items()):
                raise UserError(f"{folder}: modules_to_save names '{name}', of which the folder holds no weights")
        for at, parts in others.items():
            self.read(at, parts)

    def is_named(self, at: str, name: str) -> bool:
        """Whether modules_to_save's `name` means the module, as peft compares them."""
        return hf_module(at, self.model).endswith(name)

    def trained(self, at: str) -> bool:
        """Whether the module is one of modules_to_save."""
        return any(self.is_named(at, name) for name in self.config.modules_to_save or ())

    def base(self, at: str) -> Any:
        """The module of the base model."""
        if at == "head" and self.tied:
            return whole.sharing(self.model.embed)  # type: ignore[arg-type]
        try:
            module = self.model.get_submodule(at)
        except AttributeError:
            raise UserError(f"{self.folder}: the adapter holds {at}, which this model does not have") from None
        return module.base if isinstance(module, LoRALinear) else module

    def read(self, at: str, parts: Mapping[str, Tensor]) -> None:
        """Collects the values of one module."""
        base = self.base(at)
        for key in ("weight", "bias"):
            if key in parts and (self.trained(at) or not same(parts[key], getattr(base, key, None))):
                self.keep(at, base, key, parts[key])
        stored = parts.get("base_layer.weight", parts.get("token_adapter.base_layer.weight"))
        if stored is not None and "weight" not in parts and stored.shape != base.weight.shape:
            self.keep(at, base, "weight", stored)
        if "base_layer.bias" in parts:
            self.keep(at, base, "bias", parts["base_layer.bias"])
        if "bias" in self.values.get(at, {}) and "weight" not in parts:
            self.only_read = "trained biases"
        if (rows := parts.get("token_adapter.trainable_tokens_delta")) is not None:
            self.tokens(at, base, rows)
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            self.embedding(at, base, parts)

    def keep(self, at: str, base: Any, key: str, tensor: Tensor) -> None:
        """The module gets this tensor, a copy. UserError if it cannot be of this model."""
        mine, free = getattr(base, key, None), int(at in TABLES and key == "weight")
        if mine is None:
            raise UserError(f"{self.folder}: the adapter holds the {key} of {at}, which this model does not have")
        if tensor.dim() != mine.dim() or tensor.shape[free:] != mine.shape[free:] or not tensor.is_floating_point():
            raise UserError(
                f"{self.folder}: the {key} of {at} is {tuple(tensor.shape)} instead of {tuple(mine.shape)}: is it an "
                "adapter of this model?"
            )
        self.values.setdefault(at, {})[key] = tensor.to(mine.dtype, copy=True)

    def table(self, at: str, base: Any) -> Tensor:
        """The weight that the module gets, to be changed in place."""
        if "weight" not in self.values.get(at, {}):
            self.keep(at, base, "weight", base.weight.detach())
        return self.values[at]["weight"]

    def tokens(self, at: str, base: Any, rows: Tensor) -> None:
        """Rows of the embedding that were trained alone (trainable_token_indices)."""
        named = self.config.trainable_token_indices or []
        if isinstance(named, dict):
            named = first_fit(named, hf_module(at, self.model), [])
        weight = self.table(at, base)
        inside = all(0 <= token < len(weight) for token in named)
        if not inside or rows.shape != (len(named), weight.shape[1]):
            raise UserError(
                f"{self.folder}: the trained tokens of {at} are {tuple(rows.shape)} for {len(named)} "
                f"trainable_token_indices of a vocabulary of {len(weight)}: is it an adapter of this model?"
            )
        weight[torch.tensor(named, dtype=torch.int64)] = rows.to(weight.dtype)
        self.only_read = "single trained tokens"
        self.joint |= self.tied

    def embedding(self, at: str, base: Any, parts: Mapping[str, Tensor]) -> None:
        """LoRA of an embedding: row t of the table gets s · B A[:, t]."""
        if self.config.use_dora:
            raise UserError(f"{self.folder}: DoRA of an embedding is not supported: merge it with peft")
        weight = self.table(at, base)
        a, b = parts.get("lora_embedding_A"), parts.get("lora_embedding_B")
        if a is None or b is None or a.dim() != 2 or b.shape != (weight.shape[1], len(a)) or a.shape[1] != len(weight):
            raise UserError(f"{self.folder}: lora_embedding_A and _B do not fit {at}: is it an adapter of this model?")
        alpha = first_fit(self.config.alpha_pattern or {}, hf_module(at, self.model), self.config.lora_alpha)
        scale = alpha / (len(a) ** 0.5 if self.config.use_rslora else len(a))
        weight.copy_(weight.float().addmm(a.T.float(), b.T.float(), alpha=scale))
        self.only_read = "LoRA of an embedding"

    def merge_head(self, tensors: dict[tuple[str, str], Tensor], scale: float) -> None:
        """LoRA of a head with another number of rows than the base's becomes a head that is held whole."""
        weight = self.values["head"]["weight"]
        if self.tied:  # peft writes only one of the two then
            self.values.setdefault("embed", {"weight": weight.clone()})
        a, b = tensors["head", "lora_A"], tensors.get(("head", "lora_B"))
        if ("head", "magnitude") in tensors:
            raise UserError(f"{self.folder}: DoRA of a resized head is not supported: merge it with peft")
        if b is None or b.shape != (len(weight), len(a)) or a.shape[1] != weight.shape[1]:
            raise UserError(f"{self.folder}: lora_A and lora_B of head do not fit it: is it an adapter of this model?")
        weight.copy_(weight.float().addmm(b.float(), a.float(), alpha=scale))
        self.only_read = "LoRA of a resized head"

    def check(self, train: bool, adapts_head: bool) -> None:
        """UserError for modules that contradict each other, and with `train` for those that can be read only."""
        embed, head = (self.values.get(at, {}).get("weight") for at in TABLES)
        if self.tied and embed is not None and head is not None and torch.equal(embed, head):
            del self.values["head"]
            self.joint = True
        if self.joint and ("head" in self.values or adapts_head):
            raise UserError(
                f"{self.folder}: trained tokens of a tied embedding with a head of its own: merge it with peft"
            )
        if not self.joint and (embed is not None or head is not None):
            sizes = [len(self.base(at).weight if w is None else w) for at, w in (("embed", embed), ("head", head))]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{self.folder}: embedding and head have {sizes[0]} and {sizes[1]} rows: the adapter holds one of "
                    "them only, or is of another model"
                )
        if train and self.only_read:
            raise UserError(
                f"{self.folder}: {self.only_read} can be used and merged, but not trained further: `finetune merge` "
                "it, and train a new adapter on the result"
            )

    def put(self, name: str) -> None:
        """Makes them modules of the adapter `name`, which is on the model."""
        model: Any = self.model
        if self.tied and not self.joint and any(at in self.values for at in TABLES):
            whole.untie(model)
        made: dict[str, nn.Module] = {}
        for at, values in self.values.items():
            layer = model.get_submodule(at)
            if isinstance(layer, LoRALinear) and name in layer.parts:
                if "weight" in values:
                    raise UserError(f"{self.folder}: the adapter holds {at} whole and adapts it too")
                made[f"{at}.base"] = filled(layer.base, values)
            else:
                made[at] = filled(self.base(at), values)
                made[at].requires_grad_(self.trained(at) and not self.only_read)
        if self.joint and not model.config.tied:
            made["head"] = whole.sharing(made["embed"])  # type: ignore[arg-type]
        whole.put(model, made, name)


def same(tensor: Tensor, mine: Tensor | None) -> bool:
    """Whether the adapter's tensor is the base's own."""
    return mine is not None and tensor.shape == mine.shape and torch.equal(tensor.to(mine.dtype), mine)


def filled(module: Any, values: Mapping[str, Tensor]) -> nn.Module:
    """A module like this one with other values; the rest is shared."""
    if isinstance(module, FrozenLinear) and "weight" in values:
        made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        if module.bias is not None:
            made.bias = nn.Parameter(module.bias)
    else:
        made = copy.copy(module)
        made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    for key, tensor in values.items():
        if key == "weight":
            whole.set_weight(made, tensor)
        else:
            setattr(made, key, nn.Parameter(tensor, requires_grad=False))
    return made
