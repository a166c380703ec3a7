"""Briefs, quizzes and comparisons: how a learner speaks about a module, with the numbers of their own run.

`content` reads a module's interview.toml, `brief` fills its template, `quiz` asks its questions and keeps the review
schedule, `deck` writes them for Anki, `compare` shows modules side by side. Nothing here imports torch.
"""
