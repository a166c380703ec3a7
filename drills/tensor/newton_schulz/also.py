import torch


def newton_schulz(g, steps=5):
    x = g / (torch.sqrt(torch.sum(g * g)) + 1e-7)
    if len(g) > g.shape[1]:
        for _ in range(steps):  # the same from the right, with the small matrix XᵀX
            gram = torch.einsum("ki,kj->ij", x, x)
            x = torch.addmm(x, x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), beta=3.4445)
        return x
    for _ in range(steps):
        gram = torch.einsum("ik,jk->ij", x, x)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
