"""The judge of drawn images: a small convolutional classifier, trained on real ones, with its own accuracy stated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import optim
from finetune.diffusion.images import Images, to_unit

WIDTH, BATCH = 64, 64  # of the features; images of a step
PEAK = 3e-3  # learning rate
LARGE = 16  # pixels of a side from which on images are shifted by a pixel at random


class Judge(nn.Module):
    """Images uint8 (N, C, H, W) → class probabilities. `accuracy` is that on the held-out images it was given."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.accuracy = float("nan")
        cells = 4 if side >= LARGE else 2
        layers: list[nn.Module] = []
        for stride, (wide, out) in zip((1, 2, 2), ((channels, 16), (16, 32), (32, 64)), strict=True):
            layers += [nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [
            nn.AdaptiveMaxPool2d(cells),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * cells**2, WIDTH),
            nn.ReLU(),
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x in [−1, 1]."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (N, 64), of uint8 images."""
        self.eval()
        return torch.cat([self.body(to_unit(part)) for part in x.split(512)])

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """The likeliest class, (N,), of uint8 images."""
        return self.head(self.features(x)).argmax(-1)


def train_judge(train: Images, test: Images, steps: int = 400, seed: int = 0) -> Judge:
    """A judge trained on `train`, whose accuracy is measured on `test`.

    The same seed gives the same judge; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        height, width = train.x.shape[2:]
        judge = Judge(train.x.shape[1], min(height, width), len(train.classes))
        optimizer = optim.AdamW(judge.parameters(), lr=PEAK)
        for step in range(steps):
            rows = torch.randint(len(train), (BATCH,))
            x = to_unit(train.x[rows])
            if min(height, width) >= LARGE:
                top, left = torch.randint(3, (2,)).tolist()
                x = F.pad(x, (1, 1, 1, 1), mode="replicate")[..., top : top + height, left : left + width]
            F.cross_entropy(judge(x), train.labels[rows]).backward()
            optimizer.step(lr=optim.cosine(step, steps, 20, PEAK, 0.0))
            optimizer.zero_grad()
    judge.accuracy = (judge.classify(test.x) == test.labels).double().mean().item()
    return judge
