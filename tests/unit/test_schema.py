"""Parsing JSON documents into dataclasses, with errors that name the field."""

import dataclasses
import re
from typing import Annotated, Literal

import msgspec
import pytest

from torchpi.data.files import read_json_lines
from torchpi.errors import DatasetError
from torchpi.schema import parse, read_json, read_json_object, require_stated, write_json


@dataclasses.dataclass(frozen=True)
class Camera:
    name: str
    size: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] = ()
    layout: Literal["hwc", "chw"] | None = None

    def __post_init__(self):
        if not self.name:
            raise ValueError("A camera has no name.")


@dataclasses.dataclass(frozen=True)
class Robot:
    fps: int | float
    cameras: tuple[Camera, ...]
    by_name: dict[str, Camera] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.fps <= 0:
            raise ValueError(f"fps is {self.fps}; expected more than 0.")


DOCUMENT = {"fps": 30, "cameras": [{"name": "base", "size": [4, 6]}]}


def test_document_becomes_a_dataclass():
    robot = parse(Robot, DOCUMENT, "robot.json")
    assert robot == Robot(30, (Camera("base", (4, 6)),))
    assert isinstance(robot.fps, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": "30"}, r"robot\.json: Expected .*got `str` at `fps`"),
        ({"cameras": [{}]}, r"robot\.json: .*missing required field `name`.* at `cameras"),
        (
            {"cameras": [{"name": "base", "sizes": []}]},
            r"robot\.json has unknown fields cameras\.0\.sizes \(did you mean size\?\); known",
        ),
        ({"by_name": {"a": {"name": "a", "b": 1}}}, r"unknown fields by_name\.a\.b"),
        ({"colour": 1}, r"unknown fields colour; known are fps, cameras, by_name"),
        ({"fps": 0}, r"robot\.json: fps is 0; expected more than 0\.$"),
        ({"camera": []}, r"has unknown fields camera \(did you mean cameras\?\); known are fps, cameras, by_name\.$"),
        ({"cameras": {}}, r"^robot\.json: Expected `list`, got `object` at `cameras`\.$"),
        ({"cameras": [{"name": ""}]}, r"^robot\.json: `cameras\[0\]`: A camera has no name\.$"),
        (
            {"cameras": [{"name": "a", "size": [4, -6]}]},
            r": Expected `int` >= 1, got -6 at `cameras\[0\]\.size\[1\]`\.$",
        ),
        (
            {"cameras": [{"name": "a", "layout": "whc"}]},
            r": Invalid value 'whc' at `cameras\[0\]\.layout`; valid are 'chw', 'hwc'\.$",
        ),
        (
            {"by_name": {"a": {"name": "a", "layout": "whc"}}},
            r"Invalid value 'whc' at `by_name.*; valid are 'chw', 'hwc'",
        ),
        ({"by_name": {"a": {"name": "a", "size": [0]}}}, r"Expected `int` >= 1 at `by_name\[\.\.\.\]\.size\[0\]`"),
    ],
)
def test_invalid_field_is_named(changes, message):
    with pytest.raises(DatasetError, match=message):
        parse(Robot, DOCUMENT | changes, "robot.json", error=DatasetError)


def test_unknown_fields_of_other_programs_are_ignored():
    document = DOCUMENT | {"colour": "red"}
    assert parse(Robot, document, "robot.json", known_only=False) == parse(Robot, DOCUMENT, "robot.json")


def test_read_json(tmp_path):
    file = tmp_path / "robot.json"
    with pytest.raises(FileNotFoundError, match=r"no file .*robot\.json"):
        read_json(file)
    file.write_bytes(b"{\xff")
    with pytest.raises(DatasetError, match=r"robot\.json is not valid JSON"):
        read_json(file, error=DatasetError)
    file.write_text('{"fps": 1}')
    assert read_json(file) == {"fps": 1}


def test_unstated_field_is_named():
    complete = {"fps": 30, "cameras": [{"name": "base", "size": [4]}], "by_name": {}}
    require_stated(complete, complete, "robot.json", error=DatasetError)
    with pytest.raises(DatasetError, match=r"robot\.json lacks cameras\.0\.size, by_name; every field must be stated"):
        require_stated({"fps": 30, "cameras": [{"name": "base"}]}, complete, "robot.json", error=DatasetError)


def test_write_json_round_trips_and_nan_is_an_error(tmp_path):
    write_json(tmp_path / "robot.json", {"name": "ü", "size": [1, 2]})
    assert read_json_object(tmp_path / "robot.json") == {"name": "ü", "size": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", {"x": float("nan")})
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 40 + "1" + "}" * 40, "objects and lists are nested 40 deep; expected at most 32"),
        ('{"fps": ' + "9" * 400 + "}", "the number 99999999999999999999… has 400 digits; expected at most 40"),
        ('{"fps": -1' + "0" * 5000 + "}", "has 5002 digits"),
        ('{"fps": ' + "9" * 400 + ".5}", "the number 99999999999999999999… is too large"),
        ('{"fps": 1e999}', "the number 1e999 is too large"),
        ("\0", "Expecting value"),
    ],
)
def test_json_depth_and_number_sizes_are_limited(tmp_path, text, message):
    file = tmp_path / "robot.json"
    file.write_text(text)
    with pytest.raises(DatasetError, match=rf"robot\.json is not valid JSON: .*{re.escape(message)}"):
        read_json(file, error=DatasetError)
    if text.startswith("{"):
        with pytest.raises(DatasetError, match=r"robot\.json is .*not valid JSON"):
            read_json_lines(file)
