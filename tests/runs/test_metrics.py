"""metrics.csv over kills and resumed loops."""

from finetune.runs.metrics import Metrics


def log(metrics, phase, steps):
    for step in steps:
        metrics.log(phase, step, {"loss": repr(step / 2)})
    metrics.flush()


def whole(path):
    metrics = Metrics(path)
    log(metrics, "first", range(3))
    log(metrics, "second", range(4))
    return path.read_bytes()


def test_rows_of_later_loops_outlive_a_kill_in_an_earlier_one(tmp_path):
    """A resumed run that is killed before it comes to its second loop must not have dropped that loop's rows."""
    text = whole(tmp_path / "a.csv")
    Metrics(tmp_path / "a.csv", resume=True).keep("first", 3)
    assert (tmp_path / "a.csv").read_bytes() == text
    again = Metrics(tmp_path / "a.csv", resume=True)
    again.keep("first", 3)
    again.keep("second", 2)
    log(again, "second", range(2, 4))
    assert (tmp_path / "a.csv").read_bytes() == text


def test_rows_that_are_repeated_go_where_they_were(tmp_path):
    """A damaged checkpoint of the first loop: its last step is done again while the second loop's rows are there."""
    text = whole(tmp_path / "a.csv")
    again = Metrics(tmp_path / "a.csv", resume=True)
    again.keep("first", 2)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 7
    log(again, "first", [2])
    assert (tmp_path / "a.csv").read_bytes() == text


def test_what_was_logged_before_a_loop_is_kept_without_a_checkpoint(tmp_path):
    first = Metrics(tmp_path / "a.csv")
    first.log("train", 0, {"before": "1.0"})
    first.flush()
    for kept in (True, False):  # whether the module logs it again
        again = Metrics(tmp_path / "a.csv", resume=True)
        if kept:
            again.log("train", 0, {"before": "1.0"})
        again.keep("train", 0)
        assert (("train", 0) in again.rows) is kept


def test_a_digest_knows_the_rows_of_its_loop(tmp_path):
    metrics = Metrics(tmp_path / "a.csv")
    log(metrics, "first", range(3))
    digest = metrics.digest("first", 3)
    metrics.log("first", 2, {"after": "0.5"})  # the last row may grow
    log(metrics, "second", range(2))
    assert Metrics(tmp_path / "a.csv", resume=True).holds(digest, "first", 3)
    text = (tmp_path / "a.csv").read_text()
    for old, new in (("1,first,0.5", "1,first,0.6"), ("0,first,0.0,\n", "")):
        assert old in text
        (tmp_path / "a.csv").write_text(text.replace(old, new))
        assert not Metrics(tmp_path / "a.csv", resume=True).holds(digest, "first", 3)
