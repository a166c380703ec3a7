"""A trained denoiser in a folder: its weights, and all that drawing from it needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from finetune.diffusion.draw import Noise, batches, classifier_free, draw
from finetune.diffusion.images import to_bytes
from finetune.diffusion.process import Process
from finetune.errors import UserError
from finetune.runs import checkpoint, reading

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ProcessConfig(msgspec.Struct):
    kind: str
    schedule: str
    T: reading.Count
    zero_snr: bool


class Config(msgspec.Struct):
    """config.json of the folder."""

    architecture: str
    shape: dict[str, Any]  # arguments that make the network
    process: ProcessConfig
    image: tuple[reading.Count, reading.Count, reading.Count]  # C, H, W
    classes: Annotated[list[str], msgspec.Meta(min_length=1)]


@dataclass
class Trained:
    """A network net(x, t, labels), its process, the size of what it draws and the names of its classes.

    decode: from latents (N, C, H, W), if it draws such, to images in [−1, 1]; they are not clipped on the way. guided:
    only this many of the first channels are guided (DiT: 3)."""

    net: nn.Module
    process: Process
    image: tuple[int, int, int]
    classes: tuple[str, ...]
    decode: Callable[[Tensor], Tensor] | None = None
    guided: int | None = None

    def pictures(self, x: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) of what the network draws."""
        return to_bytes(self.decode(x) if self.decode else x)

    def draw(self, labels: Tensor, seed: int = 0, guidance: float = 1.0, batch: int = 128, **how: Any) -> Tensor:
        """Images uint8 (N, C, H, W) of labels (N,); image k is drawn with seed + k, alone or among others. `how` are
        the settings of `draw`. The network is left in the mode, training or evaluation, that it was in."""
        training, parts = self.net.training, []
        self.net.eval()
        try:
            for part in batches(len(labels), batch):
                predict = classifier_free(self.net, labels[part.start : part.stop], guidance, self.guided)
                noise = Noise([seed + k for k in part], self.image)
                x = draw(predict, self.process, noise, **{"clip": self.decode is None} | how)
                parts.append(self.pictures(x))
        finally:
            self.net.train(training)
        return torch.cat(parts)


def save(folder: Path, architecture: str, shape: dict[str, Any], trained: Trained) -> None:
    """Writes the folder: model.safetensors with the network's state, config.json with the rest."""
    process = trained.process
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(folder / WEIGHTS, {k: v.contiguous() for k, v in trained.net.state_dict().items()})
    config = Config(
        architecture,
        shape,
        ProcessConfig(process.kind, process.schedule, process.T, process.zero_snr),
        trained.image,
        list(trained.classes),
    )
    checkpoint.write_json(folder / CONFIG, msgspec.to_builtins(config))


def load(folder: Path, make: Callable[..., nn.Module]) -> Trained:
    """What `save` wrote; make(**shape) makes the network. UserError for a missing, damaged or other folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    config = reading.json_file(folder / CONFIG, Config, "is this the model/ of a finished run?")
    given = config.process
    process = Process(given.kind, given.schedule, given.T, given.zero_snr)
    try:
        net = make(**config.shape)
        net.load_state_dict(parse(reading.file_bytes(folder / WEIGHTS, 1 << 36)))
    except (SafetensorError, RuntimeError, TypeError) as e:
        raise UserError(f"{folder}: the weights are not those of its {CONFIG} ({str(e).splitlines()[0]})") from None
    return Trained(net.eval(), process, config.image, tuple(config.classes))
