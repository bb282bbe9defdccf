"""Does an error read as one line that names the value, and is it put down to whom it belongs?"""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field, ValidationError

from nbhelpers.errors import is_bad_input, one_line, refusal


class Settings(BaseModel):
    level: float = Field(ge=0, le=1)
    steps: int = 1


def caught(**values) -> ValidationError:
    with pytest.raises(ValidationError) as error:
        Settings(**values)
    return error.value


def test_every_refused_field_is_named_with_rule_and_value():
    line = one_line(caught(level=2, steps="x"))
    assert line.startswith("level must be less than or equal to 1, got 2; steps must be a valid integer")
    assert "\n" not in line and line.endswith("got 'x'")


def test_beside_its_control_a_refusal_does_not_name_the_field():
    assert refusal(caught(level=2).errors()[0], named=False) == "must be less than or equal to 1, got 2"


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("two\n lines"), "two lines"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "No such file", "a/b"), "cannot use 'a/b': no such file; check the path, its"),
    ],
)
def test_any_error_is_one_line(error, line):
    assert one_line(error).startswith(line) and "\n" not in one_line(error)


@pytest.mark.parametrize(
    "error, is_users", [(ValueError(), True), (LookupError(), True), (OSError(), True), (KeyError(), False)]
)
def test_a_wrong_value_is_the_users_and_a_missing_key_is_ours(error, is_users):
    assert is_bad_input(error) is is_users and not is_bad_input(RuntimeError())
