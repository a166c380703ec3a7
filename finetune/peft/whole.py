"""Modules that an adapter holds whole (peft: `modules_to_save`): the embedding and the head of new tokens, norms.

While the adapter is active (`lora.activate`) its copy stands in the model in place of the base's module, under the same
name; the base's is kept, and returns when another adapter or none is active. A copy may have more rows than the base:
the vocabulary of the model is that of the copy in place.

An embedding that the head shares ("tied") stays shared if one copy of it serves both. Where an adapter changes only one
of the two, as peft's do, the model gets a head of its own that begins as the same tensor (`untie`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from finetune.errors import UserError, nearest
from finetune.lm.io.hf_llama import to_hf
from finetune.lm.llama import Llama


@dataclass
class Kept:
    """What a model has in addition to the modules in place."""

    base: dict[str, nn.Module] = field(default_factory=dict)  # by name, the base's module where an adapter has its own
    parts: dict[str, dict[str, nn.Module]] = field(default_factory=dict)  # of each adapter, by name


def kept(model: nn.Module) -> Kept:
    """The modules that the adapters of this model hold whole. Not registered: the model's parameters are those in
    place."""
    return model.__dict__.setdefault("whole", Kept())


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module of this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def set_base(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the base's module of this name, while no adapter's is in place."""
    set_module(model, name, module)
    if name in (base := kept(model).base):
        base[name] = module


def fits(pattern: str, name: str) -> bool:
    """Whether the regular expression matches an ending of the name that begins at a dot."""
    try:
        return bool(re.fullmatch(rf"(.*\.)?({pattern})", name))
    except re.error as error:
        raise UserError(f"'{pattern}' is not a regular expression: {error}") from None


def hf_module(name: str, model: nn.Module | None = None) -> str:
    """`blocks.3.attn.q` → `model.layers.3.self_attn.q_proj`; the names of norms depend on the model."""
    return to_hf(f"{name}.weight", has_post_norms(model)).removesuffix(".weight")


def has_post_norms(model: nn.Module | None) -> bool:
    """Whether the model has norms after attention and MLP too, so that Hugging Face's names are Gemma's."""
    return isinstance(model, Llama) and model.config.post_norms


def train_modules(model: Llama, names: Sequence[str], name: str = "default") -> list[nn.Parameter]:
    """Has the adapter `name` train these modules whole; returns their parameters.

    names: modules as this project or as Hugging Face calls them, by their endings: `embed` or `embed_tokens`, `head` or
    `lm_head`, `norm`, `attn_norm`, `blocks.1.mlp_norm`. A tied embedding is the head too: either name trains the one
    table that both use. Call it after `lora.apply_lora`, which freezes the model. `adapters.save_adapter` writes the
    modules as peft's modules_to_save; `adapters.load_adapter` resizes the model to them, if they have other rows.
    """
    swap(model, ())
    chosen = choose(trainable(model), names, model.config.tied, has_post_norms(model))
    copies = {at: copy.deepcopy(model.get_submodule(at)).requires_grad_(True) for at in chosen}
    return put(model, copies, name)


def choose(there: Sequence[str], names: Sequence[str], tied: bool, post_norms: bool) -> list[str]:
    """Those of the modules `there` that `names` mean (see `train_modules`), of a model with these two properties.
    UserError for a name that means none."""
    called = {at: (at, to_hf(f"{at}.weight", post_norms).removesuffix(".weight")) for at in there}
    chosen: list[str] = []
    for wanted in names:
        found = [at for at in there if any(fits(wanted, name) for name in called[at])]
        if tied and wanted in ("head", "lm_head"):
            found = ["embed"]
        if not found:
            known = {name.rpartition(".")[2] for both in called.values() for name in both}
            raise UserError(f"module '{wanted}' cannot be trained whole: it names none{nearest(wanted, known)}")
        chosen += [at for at in found if at not in chosen]
    return chosen


def trainable(model: nn.Module) -> list[str]:
    """The modules with weights that are neither an adapter's nor adapted nor quantized."""
    adapted = {at.removesuffix(".parts") for at, m in model.named_modules() if at.endswith(".parts")}
    return [
        at for at, m in model.named_modules()
        if dict(m.named_parameters(recurse=False)) and not any(at.startswith(f"{layer}.") for layer in adapted)
    ]  # fmt: skip


def set_weight(module: nn.Module, weight: Tensor, learns: bool = False) -> None:
    """Replaces a module's weight by one that may have another number of rows."""
    module.weight = nn.Parameter(weight, requires_grad=learns)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(weight)
    elif isinstance(module, nn.Linear):
        module.out_features = len(weight)


def put(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> list[nn.Parameter]:
    """Makes `modules`, by name, the adapter's own, and puts them in place; returns their trained parameters."""
    state = kept(model)
    swap(model, ())
    for at in modules:
        state.base.setdefault(at, model.get_submodule(at))
    state.parts.setdefault(name, {}).update(modules)
    swap(model, (name,))
    return [p for module in modules.values() for p in module.parameters() if p.requires_grad]


def swap(model: nn.Module, names: Collection[str]) -> None:
    """Puts the modules of the adapter among `names` in place that has some, and the base's elsewhere."""
    state = kept(model)
    if len(names) > 1:
        refuse_mixing(model, names)
    own = state.parts.get(next(iter(names)), {}) if names else {}
    for at, module in state.base.items():
        set_module(model, at, own.get(at, module))
    if isinstance(model, Llama):
        fit_vocabulary(model)


def refuse_mixing(model: nn.Module, names: Collection[str]) -> None:
    """UserError if one of these adapters holds a module whole, of which there is no sum."""
    for name in names:
        for at in kept(model).parts.get(name, {}):
            raise UserError(f"the adapter '{name}' holds {at} whole: it can be switched on and off, but not mixed")


def freeze(model: nn.Module) -> None:
    """No adapter's modules are trained."""
    for modules in kept(model).parts.values():
        for module in modules.values():
            module.requires_grad_(False)


def fit_vocabulary(model: Llama) -> None:
    """The configuration's vocabulary is that of the embedding in place."""
    rows = len(model.embed.weight)
    if rows != model.config.vocab_size:
        model.config = replace(model.config, vocab_size=rows)


def untie(model: Llama) -> None:
    """Gives a model whose head is its embedding a head of its own that shares the embedding's tensor."""
    if not model.config.tied:
        return
    state = kept(model)
    swap(model, ())
    model.head = sharing(model.embed)
    model.config = replace(model.config, tied=False)
    for modules in state.parts.values():  # of adapters whose embedding serves both
        if isinstance(embed := modules.get("embed"), nn.Embedding):
            state.base["head"] = model.head
            modules["head"] = sharing(embed)


def sharing(embed: nn.Embedding) -> nn.Linear:
    """A head whose weight is the embedding's."""
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.out_features, head.in_features = embed.weight.shape
    head.weight = embed.weight
    return head


def shared(model: Llama) -> bool:
    """Whether head and embedding are one tensor."""
    return model.config.tied or getattr(model.head, "weight", None) is model.embed.weight


def settle(model: nn.Module) -> None:
    """Makes the modules in place the model's own, after its adapters were merged; a head that is still the embedding
    is tied again."""
    model.__dict__.pop("whole", None)
    if isinstance(model, Llama) and not model.config.tied and shared(model):
        del model.head
        model.config = replace(model.config, tied=True)
