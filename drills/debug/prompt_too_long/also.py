from collections import deque


def fit(prompt, answer, end, limit):
    pairs = [(token, -100) for token in prompt] + [(token, token) for token in answer] + [(end, end)]
    rest, trained = deque(pairs), len(answer) + 1
    while len(rest) > limit:
        if len(rest) > trained:
            rest.popleft()
        else:
            rest.pop()
            trained -= 1
    return [token for token, _ in rest], [label for _, label in rest]
