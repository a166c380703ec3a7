def penalized(logits, prompts, outputs, repetition, presence, frequency):
    result = logits.clone()
    for row in range(len(logits)):
        for token in {*prompts[row], *outputs[row]}:
            factor = 1 / repetition if logits[row, token] > 0 else repetition
            result[row, token] *= factor
        for token in set(outputs[row]):
            result[row, token] -= frequency * outputs[row].count(token) + presence
    return result
