"""Is a YAML file read for its plain values alone, with nothing twice and nothing run?"""

from __future__ import annotations

import pytest

from nbhelpers import yaml_files


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "config.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_values_come_as_they_are_written(file):
    assert yaml_files.read(file("name: x\nepochs: 2.5\nmodels: [a, b]\nlist_labels: 0\n")) == {
        "name": "x",
        "epochs": 2.5,
        "models": ["a", "b"],
        "list_labels": 0,
    }
    assert yaml_files.read(file('{"name": "x"}', "config.json")) == {"name": "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "'a' stands there twice"),
        ("a: &x 1\nb: *x\n", "references"),
        ("a: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_what_surprises_is_refused_with_the_name_of_the_file(file, text, says):
    with pytest.raises(ValueError, match="^config '.*config.yaml'") as error:
        yaml_files.read(file(text), "config")
    assert says in str(error.value)


def test_json_that_is_none_is_refused_by_name(file):
    with pytest.raises(ValueError, match="^config '.*broken.json' cannot be read"):
        yaml_files.read(file("{", "broken.json"), "config")
