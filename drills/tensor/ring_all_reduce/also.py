def ring_all_reduce(tensors, exchange):
    n = len(tensors)
    results = [each.clone() for each in tensors]
    parts = [each.tensor_split(n) for each in results]  # views into the results

    def turn(sent, add):
        """Every rank sends the part `sent` after its own number; the next one adds or copies it."""
        received = exchange([parts[r][(r + sent) % n].clone() for r in range(n)])
        for r in range(n):
            place = parts[r][(r - 1 + sent) % n]
            place.copy_(place + received[r] if add else received[r])

    for step in range(n - 1):
        turn(-step, add=True)
    for step in range(n - 1):
        turn(1 - step, add=False)
    return results
