"""Briefs, quizzes and comparisons: what a person says about a module, with the numbers of his own run.

`content` reads a module's interview.toml, `brief` fills its template, `quiz` asks its questions and keeps the review
schedule, `deck` writes them for Anki, `compare` sets modules side by side. Nothing here imports torch.
"""
