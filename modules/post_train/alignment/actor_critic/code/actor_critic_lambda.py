"""Actor-critic with eligibility traces, AC(λ) (Sutton & Barto 2018, section 13.5).

    δ = r + γ V(s') − V(s)
    z_π ← γ λ z_π + ∇log π(a|s)        θ_π ← θ_π + α δ z_π
    z_V ← γ λ z_V + ∇V(s)              θ_V ← θ_V + 2 c_v α δ z_V

Every step is an update. A trace assigns each TD error to the steps before it; a rollout of A2C waits for them instead.
N environments make a step together, each with traces of its own. Networks: those of a2c.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.rl.advantages import td_errors
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs.environments import sizes
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.vector import VectorEnv

from .a2c import ActorCritic, shuffled

if TYPE_CHECKING:
    from .main import Config


class ActorCriticLambda:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.model = ActorCritic(*sizes(envs.envs[0]), cfg.hidden, cfg.shared_trunk, cfg.value_scale)
        self.traces = Traces(self.model, len(envs))
        self.rates = cfg.online_lr, cfg.online_lr  # of the actor, of the critic
        groups = [{"params": self.model.actor_parameters}, {"params": list(self.model.value.parameters())}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True)
        self.rewards = RewardSize()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "envs": self.envs, "rewards": self.rewards,
                "traces": self.traces}  # fmt: skip

    # --- Collection

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.model.policy.sample(self.model.distribution(observations), rng)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.model.policy.mode(self.model.distribution(observations))

    def collect(self, rng: torch.Generator) -> Rollout:
        """(1, N) steps, with rewards in units of the largest so far."""
        rollout = self.envs.collect(lambda obs: self.act(obs, rng), 1)
        rollout.rewards = rollout.rewards / self.rewards.see(rollout.rewards)
        return rollout

    # --- Update

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        cfg = self.cfg
        r = Rollout(*(column[0] for column in vars(rollout).values()))  # the one step, (N, …)
        params, values = self.traces.add(r.observations, r.actions, cfg.gamma * cfg.lam)  # (N, P), (N,)
        with torch.no_grad():
            next_values = self.model.values(r.next_observations)  # (N,)
        deltas = td_errors(r.rewards, values.detach(), next_values, r.terminated, cfg.gamma)  # (N,)
        if cfg.shuffle:
            deltas = shuffled(deltas, rng)
        ascent = self.traces.direction(deltas, cfg.value_weight)
        parameters = list(self.model.parameters())
        entropy = self.model.policy.entropy(params).mean()
        if cfg.entropy:
            bonus = torch.autograd.grad(cfg.entropy * entropy, parameters, materialize_grads=True)
            torch._foreach_add_(ascent, bonus)
        for p, direction in zip(parameters, ascent, strict=True):
            p.grad = -direction
        self.optimizer.step()
        self.traces.reset(r.ends)
        return {"value_loss": deltas.square().mean(), "entropy": entropy.detach()}

    # --- Loop

    def train_for(self, steps: int, lr_scale: float, rng: torch.Generator) -> dict[str, float]:
        """About `steps` environment steps, an update after each. Returns the means of the updates' figures."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr_scale * rate
        updates = max(1, round(steps / len(self.envs)))
        return mean_metrics([self.update(self.collect(rng), rng) for _ in range(updates)])

    def freeze(self) -> None:
        """From now on only the critic learns; with a shared trunk, only its last layer."""
        self.rates = 0.0, self.rates[1]


class Traces:
    """z ← γ λ z + ∇, for each environment one of log π and one of V, and 0 where an episode begins.

    N environments need N gradients a step. That of a linear layer's weight is the outer product of the gradient of its
    output and its input, so one backward pass through the batch yields all of them.
    """

    def __init__(self, model: ActorCritic, rows: int) -> None:
        self.model = model
        self.policy, self.value = (
            {name: torch.zeros(rows, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()} for _ in range(2)
        )
        self.names: dict[nn.Module, str] = {
            layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
        }

    def add(self, observations: Tensor, actions: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """One step of each environment. Returns the model's outputs with their graph: params (N, P), values (N,)."""
        passed: list[tuple[nn.Module, Tensor, Tensor]] = []  # (layer, input, output)
        hooks = [layer.register_forward_hook(lambda *x: passed.append((x[0], x[1][0], x[2]))) for layer in self.names]
        params, values = self.model(observations)
        for hook in hooks:
            hook.remove()
        log_probs = self.model.policy.log_prob(params, actions)  # (N,)
        for goal, traces in ((log_probs, self.policy), (values, self.value)):
            outputs = [*(output for _, _, output in passed), params]
            gradients = torch.autograd.grad(goal.sum(), outputs, retain_graph=True, allow_unused=True)
            for (layer, inputs, _), g in zip(passed, gradients[:-1], strict=True):  # (N, in), (N, out)
                if g is not None:
                    name = self.names[layer]
                    traces[f"{name}.weight"].baddbmm_(g[:, :, None], inputs.detach()[:, None, :], beta=decay)
                    traces[f"{name}.bias"].mul_(decay).add_(g)
            if goal is log_probs and "policy.log_std" in traces:  # the second half of a Gaussian's parameters
                traces["policy.log_std"].mul_(decay).add_(gradients[-1].chunk(2, -1)[1])
        return params, values

    def direction(self, deltas: Tensor, value_weight: float) -> list[Tensor]:
        """The ascent direction: mean over environments of δ (z_π + 2 c_v z_V), for each parameter. deltas (N,)."""
        weights = deltas / len(deltas)
        return [
            torch.tensordot(weights, p, 1).add_(torch.tensordot(weights, v, 1), alpha=2 * value_weight)
            for p, v in zip(self.policy.values(), self.value.values(), strict=True)
        ]

    def reset(self, ends: Tensor) -> None:
        """ends (N,) bool: these environments begin an episode."""
        if ends.any():
            for z in (*self.policy.values(), *self.value.values()):
                z[ends] = 0.0

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"policy": self.policy, "value": self.value}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for kind, saved in state.items():
            for name, z in getattr(self, kind).items():
                z.copy_(saved[name])
