"""For tests of RL modules: a learner whose state was saved and loaded continues as if nothing had happened."""

import torch

from finetune.runs import checkpoint
from finetune.runs.run import _update


def loaded_into(state, other):
    """Puts a saved `state` into `other`, as a run's checkpoints do."""
    tree, tensors = checkpoint.flatten({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()})
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    saved = checkpoint.unflatten(tree, tensors)
    assert set(saved) == set(other)
    for name, part in other.items():
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(saved[name])
        else:
            _update(part, saved[name], name)


def continues_from_its_state(make, batch, updates=3):
    """`make()` gives a learner. After some updates its state goes into a fresh one; both then do the same, to the bit,
    whatever the fresh one was."""
    one, other = make(), make()
    for i in range(updates):
        one.update(batch, torch.Generator().manual_seed(i))
    loaded_into(one.state, other.state)
    for i in range(updates):
        ours, theirs = (x.update(batch, torch.Generator().manual_seed(10 + i)) for x in (one, other))
        assert list(ours) == list(theirs)
        assert all(map(torch.equal, ours.values(), theirs.values()))
    act = [x.act(batch.observations, torch.Generator().manual_seed(0)) for x in (one, other)]
    assert torch.equal(*act)
