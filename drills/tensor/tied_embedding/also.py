import torch


def tied_gradient(tokens, targets, embedding):
    n, vocabulary = len(tokens), len(embedding)
    chosen = torch.nn.functional.one_hot(tokens, vocabulary).to(embedding)
    wanted = torch.nn.functional.one_hot(targets, vocabulary).to(embedding)
    logits = chosen @ embedding @ embedding.T
    loss = -(wanted * torch.log_softmax(logits, 1)).sum() / n
    error = (torch.softmax(logits, 1) - wanted) / n
    both = chosen.T @ error  # (vocabulary, vocabulary): which token met which
    return loss, (both + both.T) @ embedding
