import torch

from finetune.drills.cases import Case, gradients


def drive(code, logits, legal, actions, advantages, bonus):
    x = logits.clone().requires_grad_()
    loss = code.policy_loss(x, legal, actions, advantages, bonus)
    return {"loss": loss.detach(), "gradient": gradients(loss, x)[0]}


def cases(draw):
    def arguments(b, n, bonus=0.1, share=1.0):
        legal = draw.flags(b, n, share=share)
        actions = draw.integers(n, b)
        legal[torch.arange(b), actions] = True
        return [draw.normal(b, n), legal, actions, draw.normal(b), bonus]

    yield Case("one action", arguments(1, 1))
    yield Case("two actions", arguments(1, 2, bonus=0.5))
    yield Case("no bonus", arguments(2, 3, bonus=0.0))
    yield Case("no advantage", [*arguments(2, 3)[:3], torch.zeros(2), 1.0])
    illegal = arguments(1, 3, bonus=0.5)
    illegal[1] = torch.tensor([[True, True, False]])
    illegal[2] = torch.tensor([0])
    yield Case("one of three illegal", illegal)
    zero = torch.tensor([0])
    yield Case("one of two legal", [draw.normal(1, 2), torch.tensor([[True, False]]), zero, draw.normal(1), 0.5])
    yield Case("logits far apart", [torch.tensor([[1e3, 0.0]]), torch.ones(1, 2) > 0, zero, torch.ones(1), 0.5])
    far = [torch.tensor([[0.0, 1e3]]), torch.ones(1, 2) > 0, zero, torch.ones(1), 0.5]
    yield Case("an improbable action", far)
    large = illegal[0].clone()
    large[0, 2] = 1e4
    yield Case("the illegal action has the largest logit", [large, *illegal[1:]])
    yield Case("13 rows of 31", arguments(13, 31, bonus=0.01, share=0.5))
