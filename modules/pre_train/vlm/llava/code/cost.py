def check_memory(cfg): pass
def rows(*a): return []
