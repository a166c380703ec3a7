import torch


def latent_attention(q_nope, q_rope, latents, k_rope, w_k, w_v):
    asked = torch.cat([torch.einsum("qhn,hnr->qhr", q_nope, w_k), q_rope], -1)
    cache = torch.cat([latents, k_rope], -1)
    scores = torch.einsum("qhc,kc->qhk", asked, cache) / (q_nope.shape[-1] + q_rope.shape[-1]) ** 0.5
    late = torch.arange(len(latents)) > torch.arange(len(latents) - len(q_nope), len(latents))[:, None]
    mixed = torch.softmax(scores.masked_fill(late[:, None], -torch.inf), -1) @ latents
    return torch.einsum("qhr,hvr->qhv", mixed, w_v)
