"""Files that are written completely or not at all, by any number of writers."""

import pytest

from diffstride._files import atomic_path, atomic_write_text


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "report.html"
    with atomic_path(path) as first:
        first.write_text("first")
        with atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / ("n" * 250 + ".html")  # hardly room for a suffix
    atomic_write_text(path, "before")

    def fail_half_way():
        with atomic_path(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
