import torch

from finetune.drills.cases import Case, gradients


def drive(code, images, texts, log_scale, bias):
    leaves = [x.clone().requires_grad_() for x in (images, texts, log_scale, bias)]
    losses = {"info_nce": code.info_nce(*leaves[:3]), "siglip": code.siglip(*leaves)}
    found = {name: loss.detach() for name, loss in losses.items()}
    for name, loss in losses.items():
        every = gradients(loss, *leaves)
        found |= {
            f"gradient of {of} in {name}": g for of, g in zip(("images", "texts", "log_scale"), every, strict=False)
        }
    return found


def cases(draw):
    def arguments(n, d, log_scale=0.5, bias=-0.5):
        return [draw.normal(n, d), draw.normal(n, d), torch.tensor(log_scale), torch.tensor(bias)]

    yield Case("one pair", arguments(1, 2))
    yield Case("two pairs", arguments(2, 2, 0.0, 0.0))
    yield Case("scale e", arguments(2, 3, 1.0, 0.0))
    yield Case("bias −10", arguments(2, 3, 0.0, -10.0))
    same = arguments(3, 4)
    same[1] = same[0] * 2
    yield Case("images and texts in the same directions", same)
    long = arguments(3, 4)
    long[0] *= torch.tensor([[100.0], [0.01], [1.0]])
    yield Case("rows of unlike length", long)
    yield Case("scale 1000", arguments(3, 5, 6.9, 0.0))
    strided = arguments(5, 7)
    strided[0] = draw.strided(5, 7)
    yield Case("not contiguous", strided)
    yield Case("37 pairs of 67", arguments(37, 67, 2.66, -10.0))
