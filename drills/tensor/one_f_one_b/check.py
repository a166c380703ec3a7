from finetune.drills.cases import Case


def drive(code, stage, stages, batches):
    found = {"order": code.order(stage, stages, batches), "most_alive": code.most_alive(stage, stages, batches)}
    return found | {"bubble": float(code.bubble(stages, batches))}


def cases(draw):
    for stage, stages, batches in (
        (0, 1, 1),
        (0, 1, 3),
        (1, 2, 3),
        (0, 2, 3),
        (0, 3, 4),
        (1, 3, 4),
        (2, 3, 4),
        (0, 4, 4),
        (0, 4, 2),
        (1, 4, 2),
        (2, 4, 1),
        (0, 8, 32),
        (5, 8, 32),
    ):
        yield Case(f"stage {stage} of {stages}, {batches} micro-batches", [stage, stages, batches])
