"""YAML and JSON files read as plain data, from regular files alone."""

import os

import pytest
import yaml

from diffstride.experiments.training.documents import load_yaml, read_json, read_yaml


def test_plain_data_is_read(tmp_path):
    text = "a: &x {k: 1}\nb: {<<: *x, j: [2.5, null]}\n"
    (tmp_path / "x.yaml").write_text(text)
    assert load_yaml(text) == read_yaml(tmp_path / "x.yaml") == {"a": {"k": 1}, "b": {"k": 1, "j": [2.5, None]}}
    (tmp_path / "x.json").write_text('{"a": [1, 2.5]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5]}


def test_nothing_in_a_file_is_executed(tmp_path):
    with pytest.raises(yaml.YAMLError):
        load_yaml(f"!!python/object/apply:os.mkdir [{tmp_path}/made]")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_pipes_folders_and_huge_files_are_refused(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in tmp_path / "pipe", tmp_path:
        with pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
            read(file)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than"):
        read(tmp_path / "large")
