"""The JSON form, the table form, and declared types."""

import dataclasses
import datetime as dt
import enum
import json
import pathlib
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kailash_nb import values
from kailash_nb.exceptions import UnsupportedValueError


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    when: dt.date


class Record:
    """Behaves as a database record does: keys, values, items, iteration over values."""

    def __init__(self, **fields):
        self.fields = fields

    def keys(self):
        return self.fields.keys()

    def values(self):
        return self.fields.values()

    def items(self):
        return self.fields.items()

    def __iter__(self):
        return iter(self.fields.values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": (1, 2.5, None, True)}, {"a": [1, 2.5, None, True]}),
        ({1: {"b": {3, 1, 2}}}, {"1": {"b": [1, 2, 3]}}),
        ([float("nan"), float("inf")], [None, None]),
        (dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC), "2026-03-01T12:00:00+00:00"),
        (dt.date(2026, 3, 1), "2026-03-01"),
        (dt.timedelta(minutes=1.5), 90.0),
        (Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
        (b"\x00\xff", "AP8="),
        (Colour.RED, "red"),
        (Point(1, dt.date(2026, 3, 1)), {"x": 1, "when": "2026-03-01"}),
        ([Record(id=1, at=dt.date(2026, 3, 1))], [{"id": 1, "at": "2026-03-01"}]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.float64("nan"), None),
        (np.int64(3), 3),
        (pd.NaT, None),
        (pd.Timestamp("2026-03-01"), "2026-03-01T00:00:00"),
        (pd.Series([1, 2]), [1, 2]),
        (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), [{"a": 1, "b": "x"}, {"a": 2, "b": None}]),
        (pd.DataFrame({"n": [1]}, index=pd.Index(["k"], name="key")), [{"key": "k", "n": 1}]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_every_value_has_one_json_form(value, expected):
    form = values.to_json(value)
    assert form == expected
    json.dumps(form, allow_nan=False)


def test_a_value_without_json_form_is_named_by_its_path():
    with pytest.raises(UnsupportedValueError, match=r"value\['rows'\]\[1\]\['lock'\] is a object"):
        values.to_json({"rows": [{}, {"lock": object()}]})


@pytest.mark.parametrize(
    ("value", "columns", "rows"),
    [
        ([{"a": 1, "b": 2}, {"a": 3, "b": 4}], ["a", "b"], 2),
        ([Record(a=1, b=2)], ["a", "b"], 1),
        ({"users": [{"a": 1}], "count": 1}, ["a"], 1),
        ({"x": [1, 2], "y": [3, 4]}, ["x", "y"], 2),
        ({"loaded": 3}, ["loaded"], 1),
        ([1, 2, 3], ["value"], 3),
        (7, ["value"], 1),
        (pa.table({"a": [1, 2]}), ["a"], 2),
        (pd.Series([1, 2], name="s"), ["s"], 2),
        ([], [], 0),
    ],
)
def test_values_read_as_tables(value, columns, rows):
    frame = values.to_frame(value)
    assert (list(frame.columns), len(frame)) == (columns, rows)


def test_an_empty_result_keeps_its_columns():
    assert list(values.frame_from_records([], ["a", "b"]).columns) == ["a", "b"]


def test_repeated_column_names_keep_their_values():
    frame = values.frame_from_records([(1, 2)], ["id", "id"])
    assert frame.values.tolist() == [[1, 2]]


def test_a_frames_rows_are_plain_python_values_with_none_for_missing():
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None], dtype="Int64"),
            "f": [1.5, np.nan],
            "t": pd.to_datetime(["2026-03-01", None]),
            "s": ["x", None],
            "c": pd.Categorical(["u", None]),
        }
    )
    names, rows = values.records_from_frame(frame)
    rows = list(rows)
    assert names == ["i", "f", "t", "s", "c"]
    assert rows == [(1, 1.5, dt.datetime(2026, 3, 1), "x", "u"), (None, None, None, None, None)]
    assert {type(v) for v in rows[0]} == {int, float, dt.datetime, str}


def test_columns_of_a_frame_are_chosen_by_name_and_misspellings_are_said():
    frame = pd.DataFrame({"a": [1], "b": [2]})
    names, rows = values.records_from_frame(frame, ["b"])
    assert (names, list(rows)) == (["b"], [(2,)])
    with pytest.raises(UnsupportedValueError, match="no column 'c'"):
        values.records_from_frame(frame, ["c"])


def test_an_empty_frame_has_no_rows():
    assert list(values.records_from_frame(pd.DataFrame({"a": []}))[1]) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"a": 1}] * 4912, "4,912 rows"),
        ([1], "1 item"),
        ({"loaded": 3000, "rows": [{"a": 1}]}, "loaded 3,000, rows 1 row"),
        ({str(n): n for n in range(90)}, "90 keys"),
        ({"day": {"EUR": 1.0}}, "1 key"),
        (dt.date(2026, 3, 1), "2026-03-01"),
        ("x" * 100, "'" + "x" * 38 + "…"),
    ],
)
def test_a_value_in_a_few_words(value, words):
    assert values.describe(value) == words


def test_declared_types_convert_what_json_cannot_spell():
    assert values.convert("2026-03-01", dt.date) == dt.date(2026, 3, 1)
    assert values.convert(3, float) == 3.0
    assert values.convert(dt.date(2026, 3, 1), dt.date) == dt.date(2026, 3, 1)
    frame = pd.DataFrame()
    assert values.convert(frame, pd.DataFrame) is frame


@pytest.mark.parametrize(
    ("value", "hint"), [("3", int), (True, int), ([1, "a"], list[int]), (3, pd.DataFrame), ("x", dt.date)]
)
def test_declared_types_refuse_what_does_not_fit(value, hint):
    with pytest.raises(ValueError, match=r"[Ee]xpected|[Ii]nvalid"):
        values.convert(value, hint)


def test_sizes_are_about_right_and_cheap():
    assert 7_000_000 < values.size_of(pd.DataFrame({"a": np.zeros(1_000_000)})) < 9_000_000
    assert 20_000_000 < values.size_of([{"a": 1, "b": "x"}] * 200_000) < 80_000_000
    endless = {"rows": []}
    endless["rows"].append(endless)
    assert values.size_of(endless) < 10_000
