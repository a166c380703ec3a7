"""Find the bug: Q-learning with a target network diverges.

td_loss(online, target, states, actions, rewards, next_states, ended, gamma): online and target (n, d), two linear
networks with Q(state) = state weightᵀ, (b, n); states, next_states (b, d), rewards (b,) floating point; actions (b,)
int64; ended (b,) bool → (loss, errors).
errors (b,) without a graph: Q_online(state)[action] − (reward + gamma · Q_target(next state)[best]), where best is the
action with the greatest Q_online(next state); after a state in which the episode ended there is no value.
loss: half the mean of their squares, with its gradient. It trains the online network's Q(state) only: nothing else gets
a gradient, whether or not it requires one.

    >>> weight, states = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0]])
    >>> loss, errors = td_loss(
    ...     weight, 2 * weight, states, torch.tensor([0]), torch.ones(1), states, torch.tensor([False]), gamma=0.5
    ... )
    >>> loss, errors
    (tensor(4.5000), tensor([-3.]))
"""

import torch
from torch import Tensor


def td_loss(
    online: Tensor,
    target: Tensor,
    states: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_states: Tensor,
    ended: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    q = (states.detach() @ online.T).gather(1, actions[:, None])[:, 0]
    with torch.no_grad():
        best = (next_states @ online.T).argmax(1)
        following = (next_states @ target.T).gather(1, best[:, None])[:, 0]
        goal = rewards + gamma * following * ~ended
    errors = q - goal
    return (errors**2).mean() / 2, errors.detach()
