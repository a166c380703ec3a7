def bpe_train(words, merges):
    rows = [(tuple(word), count) for word, count in words.items()]
    learned = []
    while len(learned) < merges:
        counts = {}
        for row, count in rows:
            for i in range(1, len(row)):
                counts[row[i - 1 : i + 1]] = counts.get(row[i - 1 : i + 1], 0) + count
        if not counts:
            return learned
        pair = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[0][0]
        learned.append(pair)
        new = []
        for row, count in rows:
            out = []
            fresh = False  # whether the last symbol was made in this round
            for symbol in row:
                if out and not fresh and (out[-1], symbol) == pair:
                    out[-1], fresh = out[-1] + symbol, True
                else:
                    out.append(symbol)
                    fresh = False
            new.append((tuple(out), count))
        rows = new
    return learned
