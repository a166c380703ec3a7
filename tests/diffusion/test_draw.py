"""Traps of sampling: the last step, every spacing and number of steps, guidance, seeds, known pixels, refusals."""

import math

import pytest
import torch

from finetune.diffusion import draw as drawing
from finetune.diffusion import schedules, targets
from finetune.diffusion.draw import Noise, check, classifier_free, draw
from finetune.diffusion.process import Process
from finetune.errors import UserError

T = 50
SHAPE = (1, 4, 4)
PROCESSES = {
    "eps": Process("eps", "cosine", T), "x0": Process("x0", "linear", T), "v": Process("v", "scaled_linear", T),
    "v, zero SNR": Process("v", "linear", T, zero_snr=True), "x0, zero SNR": Process("x0", "linear", T, zero_snr=True),
    "flow": Process("flow", "flow", T),
}  # fmt: skip
IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8


def allowed():
    for name, process in PROCESSES.items():
        for sampler in drawing.SAMPLERS:
            for spacing in drawing.SPACINGS:
                try:
                    check(process, sampler, 2, spacing)
                except UserError:
                    continue
                yield name, sampler, spacing


def perfect(process, seen):
    """The prediction of a network that knows that the only image is IMAGE."""

    def predict(x, t):
        seen.append(t)
        low = math.floor(t)
        bar = process.bar[low] if low == t else between(process, t)
        alpha, sigma = (float(c) for c in targets.coefficients(process.kind, float(bar)))
        eps = (x - alpha * IMAGE) / sigma
        return targets.target(process.kind, IMAGE.expand_as(x), eps, float(bar))

    return predict


def between(process, t):
    logs, low = schedules.sigmas(process.bar).log(), int(t)
    sigma = (logs[low] + (t - low) * (logs[low + 1] - logs[low])).exp()
    return 1 / (1 + sigma**2)


@pytest.mark.parametrize(("name", "sampler", "spacing"), list(allowed()))
def test_every_spacing_and_number_of_steps_reaches_x0(name, sampler, spacing):
    process = PROCESSES[name]
    for steps in (1, 2, 7, 13, T):
        seen, trace = [], []
        out = draw(perfect(process, seen), process, Noise([1, 2], SHAPE), sampler=sampler, steps=steps,
                   spacing=spacing, trace=trace)  # fmt: skip
        torch.testing.assert_close(out, IMAGE.expand_as(out), atol=1e-4, rtol=0)
        assert torch.equal(out, trace[-1])  # the last step is the denoised image, not an empty step
        times, _ = drawing.visited(process, steps, spacing)
        assert list(dict.fromkeys(seen)) == times  # the next step is the next element of the list
        assert len(seen) == (2 * steps - 1 if sampler == "heun" else steps)


def test_every_kind_of_process_is_sampled():
    assert {(n, s) for n, s, _ in allowed()} >= {
        ("eps", "ddpm"), ("eps", "dpm_solver_2m"), ("v, zero SNR", "ddim"), ("x0, zero SNR", "ddpm"), ("flow", "heun")
    }  # fmt: skip
    assert ("eps", "heun", "karras") in set(allowed())


@pytest.mark.parametrize(
    ("name", "given", "named"),
    [
        ("eps", ("plms", 5, "trailing"), "plms"),
        ("eps", ("ddim", 0, "trailing"), "number of steps"),
        ("eps", ("ddim", T + 1, "trailing"), f"1 to {T}"),
        ("eps", ("ddim", 5, "log"), "log"),
        ("eps", ("ddim", 5, "karras"), "karras"),
        ("eps", ("euler", 5, "trailing", 0.5), "eta"),
        ("flow", ("ddim", 5, "trailing"), "flow"),
        ("v, zero SNR", ("heun", 5, "trailing"), "infinite at zero terminal SNR"),
    ],
)
def test_what_does_not_go_together_is_refused(name, given, named):
    with pytest.raises(UserError, match=named) as caught:
        check(PROCESSES[name], *given)
    assert "\n" not in str(caught.value)


class Net(torch.nn.Module):
    """A network with 2 C outputs that depends on everything."""

    classes = 3

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.label = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Embedding(4, 2)

    def forward(self, x, t, labels):
        return torch.tanh(self.conv(x) + self.label(labels)[..., None, None] + (t / T)[:, None, None, None])


def test_guidance_of_0_and_1_is_exact_on_all_channels():
    net, labels = Net(), torch.tensor([0, 1, 2, 1])
    x, times = torch.randn(4, *SHAPE), torch.full((4,), 7.0)
    with torch.no_grad():
        conditional, unconditional = net(x, times, labels), net(x, times, torch.full_like(labels, 3))
    assert torch.equal(classifier_free(net, labels, 1)(x, 7), conditional)
    assert torch.equal(classifier_free(net, labels, 0)(x, 7), unconditional)
    torch.testing.assert_close(classifier_free(net, labels, 2.5)(x, 7), 2.5 * conditional - 1.5 * unconditional)
    first = classifier_free(net, labels, 2.5, channels=1)(x, 7)
    torch.testing.assert_close(first[:, :1], (2.5 * conditional - 1.5 * unconditional)[:, :1])
    torch.testing.assert_close(first[:, 1:], conditional[:, 1:])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_2m"])
@pytest.mark.parametrize("w", [1.0, 2.0])
def test_sample_k_has_its_own_seed_and_does_not_depend_on_the_batch(sampler, w):
    process, labels = PROCESSES["v"], torch.tensor([0, 1, 2, 0, 1])
    how = {"sampler": sampler, "steps": 6, "eta": 0.5 if sampler == "ddim" else 0.0}

    def some(places):
        predict = classifier_free(Net(), labels[list(places)], w)
        return draw(predict, process, Noise([100 + k for k in places], SHAPE), **how)

    together = some(range(5))
    apart = torch.cat([some(part) for part in drawing.batches(5, 2)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    assert torch.equal(together, some(range(5)))
    assert (together[0] - together[3]).abs().max() > 1e-3  # one label, two seeds


def test_noise_of_a_seed_is_the_same_bits_in_any_batch():
    whole, part = Noise([5, 6, 7], SHAPE), Noise([6], SHAPE)
    for _ in range(3):
        assert torch.equal(whole()[1], part()[0])


@pytest.mark.parametrize(("name", "sampler"), sorted({(n, s) for n, s, _ in allowed()}))
def test_known_pixels_are_exact(name, sampler):
    process, mask = PROCESSES[name], torch.zeros(SHAPE, dtype=torch.bool)
    mask[..., :2] = True

    def predict(x, t):
        return torch.sin(3 * x.flip(-1) + t)

    out = draw(predict, process, Noise([1, 2], SHAPE), sampler=sampler, steps=5, known=(IMAGE, mask))
    assert torch.equal(out[..., :2], IMAGE[..., :2].expand(2, 1, 4, 2))
    assert (out[..., 2:] - IMAGE[..., 2:]).abs().max() > 1e-2


def test_sdedit_stays_near_the_image_at_little_strength():
    process = PROCESSES["eps"]
    far = []
    for strength in (0.1, 0.5, 1.0):

        def predict(x, t):
            return x * (1 - process.bar[int(t)]).sqrt().float()  # of unit normal data

        out = draw(predict, process, Noise(range(50), SHAPE), steps=50, start=(IMAGE, strength), clip=False)
        far.append(float((out - IMAGE).square().mean()))
    assert far[0] < far[1] < far[2]
    with pytest.raises(UserError, match="strength"):
        draw(predict, process, Noise([1], SHAPE), start=(IMAGE, 0.0))
