def bpe_encode(text, merges, specials=()):
    tokens, plain, i = [], "", 0
    while i <= len(text):
        fit = max((s for s in specials if text.startswith(s, i)), key=len, default="")
        if not fit and i < len(text):
            plain += text[i]
            i += 1
            continue
        symbols = list(plain)
        for left, right in merges:
            j = 0
            while j + 1 < len(symbols):
                if symbols[j] == left and symbols[j + 1] == right:
                    symbols[j : j + 2] = [left + right]
                j += 1
        tokens += symbols
        plain = ""
        if i == len(text):
            return tokens
        tokens.append(fit)
        i += len(fit)
    return tokens
