import csv

import pytest

from volsal.plugin.review import Review, ReviewError, Reviews

WORDS = ["", "fine", "=HYPERLINK(1)", "+1 mm", "-3", "@me", "'tis so", "'=x", "''a", 'a "b", c; d', "Läsion ✓ <script>"]


@pytest.mark.parametrize("words", WORDS)
def test_what_was_said_is_read_again_and_is_no_formula(tmp_path, words):
    reviews = Reviews(tmp_path / "review.csv")
    reviews.write("case-1", Review("plausible", words))
    assert Reviews(tmp_path / "review.csv").read() == {"case-1": Review("plausible", words)}
    with (tmp_path / "review.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert not row["comment"].startswith(("=", "+", "@"))


def test_a_second_word_replaces_the_first_and_no_other_row(tmp_path):
    first, second = (Reviews(tmp_path / "review.csv") for _ in range(2))
    first.write("a", Review("plausible"))
    second.write("b", Review("doubtful", "near the rim"))  # as from another window
    first.write("a", Review("implausible"))
    assert first.read() == {"a": Review("implausible"), "b": Review("doubtful", "near the rim")}
    assert list(tmp_path.iterdir()) == [tmp_path / "review.csv"]


def test_what_another_window_said_of_the_same_case_stays(tmp_path):
    first, second = (Reviews(tmp_path / "review.csv") for _ in range(2))
    first.write("a", Review("implausible"), Review())
    second.write("a", Review("", "near the rim"), Review())  # who saw no verdict yet
    assert first.read() == {"a": Review("implausible", "near the rim")}
    first.write("a", Review("", "near the rim"), Review("implausible", "near the rim"))
    assert first.read() == {"a": Review("", "near the rim")}


def test_a_line_that_ends_early_is_read(tmp_path):
    (tmp_path / "review.csv").write_text("verdict,case\nplausible,a\ndoubtful\n")
    assert Reviews(tmp_path / "review.csv").read() == {"a": Review("plausible"), "": Review("doubtful")}


def test_columns_and_rows_of_others_stay(tmp_path):
    path = tmp_path / "review.csv"
    path.write_bytes("\ufeffcase,reader,verdict\r\ngone,'@Ann,doubtful\r\na,Bo,plausible,spilled\r\n".encode())
    Reviews(path).write("a", Review("implausible", "look"))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["reader"], row["verdict"], row["comment"]) for row in rows] == [
        ("gone", "'@Ann", "doubtful", ""),
        ("a", "Bo", "implausible", "look"),
    ]
    assert rows[1]["column 4"] == "spilled"


@pytest.mark.parametrize("content", [b"case;verdict\r\na;plausible\r\n", b"\xff\xfe\x00", b"name,age\r\n"])
def test_a_file_that_is_none_of_ours_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "review.csv"
    path.write_bytes(content)
    with pytest.raises(ReviewError, match=r"review\.csv"):
        Reviews(path).write("a", Review("plausible"))
    assert path.read_bytes() == content
