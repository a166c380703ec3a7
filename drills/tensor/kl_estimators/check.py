import torch

from finetune.drills.cases import Case


def drive(code, logp, reference_logp, logits, reference_logits):
    k1, k2, k3 = code.estimates(logp, reference_logp)
    return {"k1": k1, "k2": k2, "k3": k3, "exact": code.exact(logits, reference_logits)}


def cases(draw):
    def near(difference, n=1):
        return torch.full((n,), -1.0), torch.full((n,), -1.0 + difference)

    two = draw.normal(2), draw.normal(2)
    yield Case("one token, log ratio −1", [*near(-1.0), *two])
    yield Case("one token, log ratio 2", [*near(2.0), *two])
    yield Case("equal policies", [*near(0.0), two[0], two[0]])
    small = torch.tensor([0.0]), torch.tensor([1e-4])
    yield Case("log ratio 1e-4", [*small, *two], length=7_000_000_000)  # right to 1 %
    for who, logits, reference_logits in (
        ("neither can say", [0.0, 1.0, -torch.inf], [0.5, 0.0, -torch.inf]),
        ("the policy cannot say", [0.0, -torch.inf], [0.5, 0.0]),
        ("the reference cannot say", [0.0, 0.0], [0.5, -torch.inf]),
    ):
        args = [*near(0.5), torch.tensor(logits), torch.tensor(reference_logits)]
        yield Case(f"a token that {who}", args)
    yield Case("logits far apart", [*near(0.5), torch.tensor([0.0, 1e4]), torch.tensor([5e3, 0.0])])
    yield Case("two rows", [draw.normal(2, 3) - 2, draw.normal(2, 3) - 2, draw.normal(2, 5), draw.normal(2, 5)])
    logp = draw.normal(67) - 2
    many = [logp, logp + draw.normal(67, scale=0.3), draw.normal(3, 7, 101), draw.normal(3, 7, 101)]
    yield Case("67 tokens, a vocabulary of 101", many)
