import torch

from finetune.drills.cases import Case


def drive(code, images, weight, bias, patches):
    """patches: those of an image of the same size and channels."""
    (c, _, w), p = images.shape[1:], weight.shape[-1]
    return {"patch_embed": code.patch_embed(images, weight, bias), "unpatchify": code.unpatchify(patches, c, p, w)}


def reference(images, weight, bias, patches):
    p = weight.shape[-1]
    embedded = torch.nn.functional.conv2d(images, weight, bias, stride=p).flatten(2).mT
    image = torch.nn.functional.fold(patches.mT, images.shape[2:], p, stride=p)
    return {"patch_embed": embedded, "unpatchify": image}


def cases(draw):
    def arguments(b, c, h, w, d, p):
        n = (h // p) * (w // p)
        return [draw.normal(b, c, h, w), draw.normal(d, c, p, p), draw.normal(d), draw.normal(b, n, c * p * p)]

    yield Case("one patch of one pixel", arguments(1, 1, 1, 1, 1, 1))
    yield Case("one patch of four pixels", arguments(1, 1, 2, 2, 1, 2))
    yield Case("two patches in a row", arguments(1, 1, 2, 4, 1, 2))
    yield Case("two patches in a column", arguments(1, 1, 4, 2, 1, 2))
    yield Case("four patches", arguments(1, 1, 4, 4, 3, 2))
    yield Case("three channels", arguments(1, 3, 2, 2, 2, 2))
    yield Case("two images", arguments(2, 3, 4, 6, 5, 2))
    strided = arguments(2, 2, 6, 9, 4, 3)
    strided[0] = draw.strided(2, 2, 6, 9)
    yield Case("not contiguous", strided)
    yield Case("35 patches of 49 pixels", arguments(1, 3, 35, 49, 17, 7), length=147)
