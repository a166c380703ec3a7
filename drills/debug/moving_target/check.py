from finetune.drills.cases import Case, gradients


def drive(code, online, target, states, actions, rewards, next_states, ended, gamma):
    leaves = [x.clone().requires_grad_() for x in (online, target, states, rewards, next_states)]
    a, b, s, r, after = leaves
    loss, errors = code.td_loss(a, b, s, actions, r, after, ended, gamma)
    names = "online", "target", "states", "rewards", "next_states"
    found = {"loss": loss.detach(), "errors": errors.detach(), "errors without a graph": not errors.requires_grad}
    return found | {f"gradient of {n}": g for n, g in zip(names, gradients(loss, *leaves), strict=True)}


def cases(draw):
    def arguments(b, n, d, ended=0.0, gamma=0.9):
        networks, states = (draw.normal(n, d), draw.normal(n, d)), (draw.normal(b, d), draw.normal(b, d))
        flags = draw.flags(b, share=ended)
        return [*networks, states[0], draw.integers(n, b), draw.normal(b), states[1], flags, gamma]

    yield Case("no future", arguments(1, 2, 1, gamma=0.0))
    yield Case("one step at the end of an episode", arguments(1, 2, 2, ended=1.0))
    yield Case("one step, one action", arguments(1, 1, 1))
    yield Case("one step", arguments(1, 2, 2))
    for i in range(3):
        yield Case(f"two steps, three actions, {i + 1}", arguments(2, 3, 2))
    yield Case("some at the end", arguments(5, 3, 4, ended=0.5))
    yield Case("37 steps", arguments(37, 7, 11, ended=0.2, gamma=0.99))
