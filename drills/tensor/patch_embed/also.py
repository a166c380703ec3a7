import torch


def patch_embed(images, weight, bias):
    p = weight.shape[-1]
    patches = torch.nn.functional.unfold(images, p, stride=p)
    return torch.einsum("bkn,dk->bnd", patches, weight.flatten(1)) + bias


def unpatchify(patches, c, p, w):
    b, n, _ = patches.shape
    image = patches.new_empty(b, c, n * p // (w // p), w)
    for i in range(n):
        y, x = p * (i // (w // p)), p * (i % (w // p))
        image[:, :, y : y + p, x : x + p] = patches[:, i].view(b, c, p, p)
    return image
