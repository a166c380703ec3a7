"""training_curves.png: what is averaged, what is on which axis, and what is no curve at all."""

import math

import pytest

from finetune.runs import plots


def drawn(monkeypatch, series, **levels):
    """The visible axes of the picture, by title."""
    made = []
    figure = plots.figure
    monkeypatch.setattr(plots, "figure", lambda *a: made.append(figure(*a)) or made[-1])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: None)
    plots.training_curves(None, "run", series, **levels)
    return {axes.get_title(loc="left"): axes for axes in made[0][1] if axes.get_visible()}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_moving_average_is_the_mean_of_its_window():
    ys = [1e16, 1.0, 2.0, 3.0, math.inf, 5.0, math.nan, 7.0]
    assert plots.moving_average(ys, 3)[2:] == [2.0, 2.5, 4.0, 5.0, 6.0, 7.0]  # not 0 after 1e16, not NaN after inf
    assert plots.moving_average([math.nan] * 3, 3) == pytest.approx([math.nan] * 3, nan_ok=True)
    assert plots.moving_average([4.0, 2.0], 9) == [3.0, 3.0]
    assert plots.moving_average([], 3) == []


def test_what_falls_over_decades_keeps_its_last_values():
    ys = [10.0 ** -(i / 10) for i in range(200)]
    smooth = plots.moving_average(ys, 9)
    for i in range(4, 196):
        assert smooth[i] == pytest.approx(sum(ys[i - 4 : i + 5]) / 9, rel=1e-12)


def test_only_noise_is_averaged(monkeypatch):
    xs = list(range(100))
    schedule = [min(x, 10) * (1 - x / 100) for x in xs]
    noise = [(x * 37 % 11) / 11 for x in xs]
    found = drawn(monkeypatch, {"lr": (xs, schedule), "loss": (xs, noise)})
    assert len(found["lr"].lines) == 1
    assert list(found["lr"].lines[0].get_ydata()) == schedule
    assert labels(found["loss"]) == ["each step", "moving average"]


def test_one_or_two_values_are_listed_and_not_drawn(monkeypatch):
    series = {"a": ([0, 1, 2], [1.0, 2.0, 3.0]), "b": ([7], [0.125]), "c": ([0, 8], [1.0, -2.5])}
    found = drawn(monkeypatch, series)
    assert list(found) == ["a", "logged once or twice"]
    assert texts(found["logged once or twice"]) == ["b", "0.125", "c", "1, -2.5"]
    many = {f"m{i}": ([0], [float(i)]) for i in range(26)}
    assert len(drawn(monkeypatch, many)) == 1  # of the same title: 3 panels in place of 26
    assert sum(len(axes.texts) for axes in drawn(monkeypatch, many).values()) <= 2 * plots.LISTED


def test_decades_get_a_log_axis(monkeypatch):
    xs = list(range(5))
    found = drawn(monkeypatch, {"falls": (xs, [1, 1e-2, 1e-4, 1e-6, 0.0]), "signed": (xs, [1, 1e-3, 1e-6, -1e-3, -1])})
    assert found["falls"].get_yscale() == "log"
    assert found["signed"].get_yscale() == "linear"


def test_a_level_far_off_is_said_and_not_drawn(monkeypatch):
    xs, ys = list(range(5)), [8.0, 7.5, 7.2, 7.1, 7.0]
    levels = {"baseline": {"x": 0.1}, "target": {"x": 0.3}, "higher": {"x": True}}
    axes = drawn(monkeypatch, {"x": (xs, ys)}, **levels)["x"]
    assert labels(axes) == ["baseline 0.1, far below", "target ≥ 0.3, far below"]
    assert axes.get_ylim()[0] > 6
    near = drawn(monkeypatch, {"x": (xs, ys)}, target={"x": 6.5}, higher={"x": False})["x"]
    assert labels(near) == ["target ≤ 6.5"]
