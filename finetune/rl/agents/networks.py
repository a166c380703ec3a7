"""Networks of deep RL agents: policies with their distributions, state values and action values.

A policy's distribution is a tensor of parameters on which functions work: log π of the classes (…, A) of a Categorical,
mean and log standard deviation side by side (…, 2 A) of a Gaussian. `observations` is the length of an observation's
vector, or the `Image` that it is: its networks begin with convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.rl.envs.spaces import Image

# Output channels, kernel and stride of each layer: those of DQN (Mnih et al. 2015) from 36 pixels a side on, which is
# what they reduce to one; smaller images have two layers of 3 × 3.
LARGE, SMALL = ((32, 8, 4), (64, 4, 2), (64, 3, 1)), ((16, 3, 1), (32, 3, 2))


class Convolutions(nn.Module):
    """Convolutions with ReLU over the flat pixels of an image; `width` features. Where strides do not fit, zeros are
    added at the lower and right edge, so that every pixel is seen. `count` independent networks are computed together,
    as groups of channels."""

    def __init__(self, image: Image, count: int = 1) -> None:
        super().__init__()
        self.image, self.count = image, count
        layers = []
        channels, sides = image.channels, [image.height, image.width]
        self.padding: list[list[int]] = []  # (left, right, upper, lower) of each layer
        for out, kernel, stride in LARGE if min(sides) >= 36 else SMALL:
            layers.append(nn.Conv2d(count * channels, count * out, kernel, stride, groups=count))
            lower, right = ((kernel - side) % stride for side in sides)
            self.padding.append([0, right, 0, lower])
            channels, sides = out, [-(-(side - kernel) // stride) + 1 for side in sides]
        self.layers = nn.ModuleList(layers)
        self.width = channels * math.prod(sides)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) of uint8 or floats → (…, width). Several networks: (count, N, D) → (count, N, width)."""
        image, lead = self.image, x.shape[:-1]
        x = x.reshape(-1, *image.shape).permute(0, *(1 + axis for axis in image.axes))
        x = x.reshape(len(x), image.channels, image.height, image.width).float() / image.largest  # (…, C, H, W)
        if self.count > 1:
            x = x.unflatten(0, (self.count, -1)).transpose(0, 1).flatten(1, 2)  # (N, count · C, H, W)
        for layer, padding in zip(self.layers, self.padding, strict=True):
            x = layer(F.pad(x, padding)).relu()
        if self.count > 1:
            x = x.unflatten(1, (self.count, -1)).transpose(0, 1)  # (count, N, channels, height, width)
        return x.reshape(*lead, self.width)


def _widths(sizes: Sequence[int | Image]) -> tuple[list[Convolutions], list[int]]:
    """The convolutions of an image, which may be the first of `sizes`, and the widths of the linear layers."""
    first, *rest = sizes
    after = [size for size in rest if isinstance(size, int)]
    if not isinstance(first, Image):
        return [], [first, *after]
    convolutions = Convolutions(first)
    return [convolutions], [convolutions.width, *after]


def relu_mlp(sizes: Sequence[int | Image]) -> nn.Sequential:
    """Linear layers with ReLU between them, in torch's default initialization, as SAC's and TD3's authors do."""
    before, widths = _widths(sizes)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*before, *layers[:-1])


class Layers(nn.Sequential):
    """Layers in order. Linear ones and tanh, if they have no hooks, are computed without the calls of modules, which
    take longer than products as small as those of one step of a few environments."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            if type(layer) is nn.Linear and not hooked(layer):
                x = F.linear(x, layer._parameters["weight"], layer._parameters["bias"])  # type: ignore[arg-type]
            elif type(layer) is nn.Tanh and not hooked(layer):
                x = x.tanh()
            elif layer is not None:
                x = layer(x)
        return x


def tanh_mlp(sizes: Sequence[int | Image], last_scale: float = 1.0) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights, the last layer's multiplied by last_scale; biases 0. So
    are the convolutions before them, as is usual in PPO."""
    before, widths = _widths(sizes)
    for layer in [layer for convolutions in before for layer in convolutions.modules()]:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        linear = nn.Linear(a, b)
        last = i == len(widths) - 2
        nn.init.orthogonal_(linear.weight, last_scale if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return Layers(*before, *layers)


def hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class Ensemble(nn.Module):
    """`count` independent networks with ReLU between their layers, computed together: one batched product a layer."""

    def __init__(self, count: int, widths: list[int]) -> None:
        super().__init__()
        self.count = count
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(widths):
            bound = 1 / math.sqrt(a)  # torch's own for nn.Linear
            self.weights.append(nn.Parameter(torch.empty(count, a, b).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(count, 1, b).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """(count, N, first width) → (count, N, last width)."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x


@torch.no_grad()
def flattened(model: nn.Module) -> nn.Parameter:
    """All parameters of a model, in fp32, in one row with one row of gradients, of which they and their gradients
    become views: for small networks most of the time of an optimizer's step, of a norm and of zeroing is the count of
    tensors. Zero the row's gradient, instead of setting it to None."""
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, values, gradient in zip(parameters, flat.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = values.view_as(p), gradient.view_as(p)
    return flat


# --- Stochastic policies


class Categorical(nn.Module):
    """A policy over discrete actions."""

    def __init__(self, observations: int | Image, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.net = tanh_mlp([observations, *hidden, actions], last_scale=0.01)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).log_softmax(-1)

    @staticmethod
    def sample(params: Tensor, rng: torch.Generator) -> Tensor:
        """One action for each distribution, by inverting the cumulative probabilities."""
        uniform = torch.rand(params.shape[:-1], generator=rng)
        below = params.exp().cumsum(-1)[..., :-1] <= uniform[..., None]
        return below.sum(-1)

    @staticmethod
    def mode(params: Tensor) -> Tensor:
        return params.argmax(-1)

    @staticmethod
    def log_prob(params: Tensor, actions: Tensor) -> Tensor:
        return params.gather(-1, actions[..., None])[..., 0]

    @staticmethod
    def entropy(params: Tensor) -> Tensor:
        return -(params.exp() * params).sum(-1)

    @staticmethod
    def kl(old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new)"""
        return (old.exp() * (old - new)).sum(-1)


class Gaussian(nn.Module):
    """A policy with independent normal actions; the standard deviations do not depend on the observation."""

    def __init__(self, observations: int | Image, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.net = tanh_mlp([observations, *hidden, actions], last_scale=0.01)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, observations: Tensor) -> Tensor:
        mean = self.net(observations)
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)

    @staticmethod
    def sample(params: Tensor, rng: torch.Generator) -> Tensor:
        mean, log_std = params.chunk(2, -1)
        return mean + log_std.exp() * torch.randn(mean.shape, generator=rng)

    @staticmethod
    def mode(params: Tensor) -> Tensor:
        return params.chunk(2, -1)[0]

    @staticmethod
    def log_prob(params: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = params.chunk(2, -1)
        z = (actions - mean) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    @staticmethod
    def entropy(params: Tensor) -> Tensor:
        return (params.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    @staticmethod
    def kl(old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new)"""
        (m0, s0), (m1, s1) = old.chunk(2, -1), new.chunk(2, -1)
        return (s1 - s0 + ((2 * s0).exp() + (m0 - m1).square()) / (2 * (2 * s1).exp()) - 0.5).sum(-1)


# --- Policies with bounded actions: SAC's and TD3's


class Bounded(nn.Module):
    """A policy whose actions lie within bounds: center + scale · tanh(·)."""

    center: Tensor  # (A,)
    scale: Tensor  # (A,)

    def __init__(self, observations: int, outputs: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.net = relu_mlp([observations, *hidden, outputs])
        self.register_buffer("center", (high + low) / 2, persistent=False)
        self.register_buffer("scale", (high - low) / 2, persistent=False)


class SquashedGaussian(Bounded):
    """SAC's policy: a = center + scale · tanh(u), u normal. Its parameters are mean and log std of u (…, 2 A).

    log π is the density of the action itself: log N(u) − Σ log(scale · (1 − tanh² u)).
    """

    LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0

    def __init__(self, observations: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__(observations, 2 * len(low), hidden, low, high)

    def forward(self, observations: Tensor) -> Tensor:
        mean, log_std = self.net(observations).chunk(2, -1)
        return torch.cat([mean, log_std.clamp(self.LOG_STD_MIN, self.LOG_STD_MAX)], -1)

    @property
    def target_entropy(self) -> float:
        """SAC's entropy target: −1 nat for each dimension of an action scaled to −1 … 1."""
        return float(self.scale.log().sum()) - len(self.scale)

    def rsample(self, params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """noise (…, A) standard normal → actions (…, A) and log π (…); differentiable in params."""
        mean, log_std = params.chunk(2, -1)
        u = mean + log_std.exp() * noise
        return self.center + self.scale * u.tanh(), self._log_prob(u, noise, log_std)

    def mode(self, params: Tensor) -> Tensor:
        """The action of the mean of u, which is the median."""
        return self.center + self.scale * params.chunk(2, -1)[0].tanh()

    def log_prob(self, params: Tensor, actions: Tensor, within: float = 1e-6) -> Tensor:
        """log π (…) of given actions. One on a bound, where the density is 0, counts as `within` · scale inside it."""
        mean, log_std = params.chunk(2, -1)
        u = ((actions - self.center) / self.scale).clamp(within - 1, 1 - within).atanh()
        return self._log_prob(u, (u - mean) * torch.exp(-log_std), log_std)

    def _log_prob(self, u: Tensor, z: Tensor, log_std: Tensor) -> Tensor:
        squashed = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh² u), also where tanh² u rounds to 1
        normal = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return (normal - squashed - self.scale.log()).sum(-1)


class Deterministic(Bounded):
    """TD3's policy: a = center + scale · tanh(net(s))."""

    def __init__(self, observations: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__(observations, len(low), hidden, low, high)

    def forward(self, observations: Tensor) -> Tensor:
        return self.center + self.scale * self.net(observations).tanh()


# --- Values


class Value(nn.Module):
    """V(s)."""

    def __init__(self, observations: int | Image, hidden: list[int]) -> None:
        super().__init__()
        self.net = tanh_mlp([observations, *hidden, 1])

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)[..., 0]


class TwinQ(Ensemble):
    """`count` independent networks of Q(s, a), two in SAC and TD3."""

    def __init__(self, observations: int, actions: int, hidden: list[int], count: int = 2) -> None:
        super().__init__(count, [observations + actions, *hidden, 1])

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """(…, D), (…, A) → (count, …); the leading sizes are broadcast."""
        lead = observations.shape[:-1]
        if lead != actions.shape[:-1]:
            lead = torch.broadcast_shapes(lead, actions.shape[:-1])
            observations, actions = observations.expand(*lead, -1), actions.expand(*lead, -1)
        x = torch.cat([observations, actions], -1)
        return super().forward(x.reshape(-1, x.shape[-1]).expand(self.count, -1, -1)).reshape(self.count, *lead)


class QNetwork(nn.Module):
    """Q(s, ·) of discrete actions; in behavior cloning its outputs are logits."""

    def __init__(self, observations: int | Image, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.actions = actions
        self.net = relu_mlp([observations, *hidden, actions])

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)  # (N, A)
