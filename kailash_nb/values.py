"""Values between nodes: their one JSON form, their table form, and the types a parameter may declare.

The JSON form, the same at every door:

==========================================  =====================================================================
dict, list, str, int, float, bool, None     themselves; a mapping's keys become strings; NaN and infinity are null
tuple, set, frozenset, numpy array          array (a set in sorted order where it can be sorted)
datetime, date, time, pandas Timestamp      ISO 8601 string
timedelta                                   seconds, a number
Decimal, UUID, path                         string, exactly
bytes                                       base64 string
enum                                        its value
asyncpg Record, dataclass, any Mapping      object
DataFrame                                   array of one object per row (a named index becomes a column)
Series                                      array
==========================================  =====================================================================

pandas and pyarrow are imported when a table is first asked for, here and nowhere else.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import itertools
import math
import pathlib
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .exceptions import UnsupportedValueError, did_you_mean, listed

if TYPE_CHECKING:
    import pandas as pd


def to_json(value: Any) -> Any:
    """The JSON form of a value, made of dict, list, str, int, float, bool and None only.

    Raises UnsupportedValueError naming the path of the first value that has none.
    """
    try:
        return _json(value, "value")
    except RecursionError:
        raise UnsupportedValueError("the value holds itself, or is nested too deeply for JSON") from None


def _json(value: Any, path: str) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is dict or isinstance(value, Mapping):
        return {k if type(k) is str else str(k): _json(v, f"{path}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [_json(v, f"{path}{{...}}") for v in _ordered(value)]
    convert = _SCALARS.get(kind)
    return convert(value) if convert else _json_rare(value, path)


def _json_rare(value: Any, path: str) -> Any:
    if isinstance(value, enum.Enum):
        return _json(value.value, path)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        return _json(rows_of(value), path)
    if pandas is not None and isinstance(value, (pandas.Series, pandas.Index)):
        return _json(value.tolist(), path)
    if pandas is not None and (value is pandas.NaT or value is pandas.NA):
        return None
    for scalar, convert in _SCALARS.items():
        if isinstance(value, scalar):
            return convert(value)
    if isinstance(value, (str, int)):  # a subclass, such as a StrEnum's or an IntFlag's base
        return str(value) if isinstance(value, str) else int(value)
    if hasattr(value, "tolist") and type(value).__module__.startswith("numpy"):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        # In nanoseconds numpy would give plain integers.
        exact = value.astype(f"{'datetime64' if kind == 'M' else 'timedelta64'}[us]") if kind in ("M", "m") else value
        return _json(exact.tolist(), path)
    if hasattr(value, "keys") and hasattr(value, "values") and hasattr(value, "items"):  # asyncpg.Record
        return {str(k): _json(v, f"{path}[{k!r}]") for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _json(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    raise UnsupportedValueError(
        f"{path} is a {type(value).__qualname__}, which has no JSON form; return plain values, dates or a DataFrame"
    )


_PLAIN = frozenset({str, int, bool, type(None)})
_SCALARS: dict[type, Any] = {
    dt.datetime: dt.datetime.isoformat,
    dt.date: dt.date.isoformat,
    dt.time: dt.time.isoformat,
    dt.timedelta: dt.timedelta.total_seconds,
    decimal.Decimal: str,
    uuid.UUID: str,
    pathlib.PurePath: str,
    bytes: lambda value: base64.b64encode(value).decode(),
    bytearray: lambda value: base64.b64encode(value).decode(),
    float: lambda value: float(value) if math.isfinite(value) else None,
}


def _ordered(values: Iterable[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


# ------------------------------------------------------------------------------------------------------------- tables


def pandas() -> Any:
    """The pandas module; raises UnsupportedValueError with the install line where it is missing."""
    try:
        import pandas as module
    except ImportError:
        raise UnsupportedValueError('tables need pandas: pip install "kailash-nb[notebook]"') from None
    return module


def to_frame(value: Any) -> pd.DataFrame:
    """The table form of a node's value.

    A DataFrame is itself; a Series or a list of rows (mappings, sequences, records) becomes rows; an Arrow table is
    converted; a mapping whose one output is a table gives that table, a mapping of equally long columns gives columns,
    any other mapping one row; a scalar gives one cell called ``value``.
    """
    pd = pandas()
    if isinstance(value, pd.DataFrame):
        return value
    if isinstance(value, pd.Series):
        return value.to_frame()
    if hasattr(value, "to_pandas"):
        return value.to_pandas()
    if isinstance(value, Mapping):
        return _frame_of_mapping(value)
    if isinstance(value, (list, tuple)):
        return _frame_of_rows(value)
    return pd.DataFrame({"value": [value]})


def is_table(value: Any) -> bool:
    """Whether a value reads as rows and columns: a frame, an Arrow table, or a list of mappings or records."""
    if hasattr(value, "to_pandas") or (hasattr(value, "columns") and hasattr(value, "iloc")):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and _is_row(value[0])


def row_count(value: Any) -> int | None:
    """How many rows a table (or list) has, None for anything else; reads no data."""
    if is_table(value) or isinstance(value, (list, tuple, set, frozenset)):
        return len(value)
    return None


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A DataFrame's rows as mappings of plain Python values; a named index comes along as columns, missing is None."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        raise UnsupportedValueError(f"two columns have one name, of which a row would lose one: {listed(names)}")
    return [dict(zip(names, row, strict=True)) for row in _plain_rows(frame)]


def frame_from_records(records: Sequence[Any], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A DataFrame of database records; ``columns`` names them where there is no record to ask."""
    pd = pandas()
    names = list(columns) if columns is not None else list(records[0].keys()) if records else []
    if not records:
        return pd.DataFrame(columns=names)
    # Column by column: five times faster than one dict per row, and a repeated column name keeps its values.
    return pd.DataFrame([tuple(record) for record in records], columns=names)


def records_from_frame(
    frame: pd.DataFrame, columns: Sequence[str] | None = None
) -> tuple[list[str], Iterable[tuple[Any, ...]]]:
    """The column names and the rows of a DataFrame as plain Python values (missing is None), for a COPY into a table.

    Raises UnsupportedValueError where a named column is not in the frame.
    """
    names = [str(name) for name in frame.columns] if columns is None else list(columns)
    known = [str(name) for name in frame.columns]
    missing = [name for name in names if name not in known]
    if missing:
        raise UnsupportedValueError(
            f"the frame has no column {missing[0]!r}{did_you_mean(missing[0], known)} (columns: {listed(known)})"
        )
    return names, _plain_rows(frame[names] if columns is not None else frame)


def _plain_rows(frame: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    pd = pandas()
    plain = []
    for position in range(frame.shape[1]):
        column = frame.iloc[:, position]
        values = column.astype(object).where(column.notna(), None)
        plain.append([v.to_pydatetime() if isinstance(v, pd.Timestamp) else v for v in values.tolist()])
    return zip(*plain, strict=True) if plain else iter([()] * len(frame))


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "values"))


def _frame_of_mapping(value: Mapping[str, Any]) -> pd.DataFrame:
    tables = [item for item in value.values() if is_table(item)]
    if len(tables) == 1:
        return to_frame(tables[0])
    pd = pandas()
    columns = [item for item in value.values() if isinstance(item, (list, tuple))]
    if columns and len(columns) == len(value) and len({len(c) for c in columns}) == 1 and not tables:
        return pd.DataFrame(dict(value))
    return pd.DataFrame([dict(value)])


def _frame_of_rows(rows: Sequence[Any]) -> pd.DataFrame:
    pd = pandas()
    if rows and _is_row(rows[0]) and not isinstance(rows[0], Mapping):
        return frame_from_records(rows)
    if rows and not isinstance(rows[0], (Mapping, list, tuple)):
        return pd.DataFrame({"value": list(rows)})
    return pd.DataFrame(list(rows))


def describe(value: Any) -> str:
    """A value in a few words for a status line: ``4,912 rows``, ``loaded 3, failed 0``, ``90 keys``, ``'text…'``."""
    if isinstance(value, Mapping):
        if 0 < len(value) <= 3 and not any(isinstance(item, Mapping) for item in value.values()):
            return ", ".join(f"{key} {describe(item)}" for key, item in value.items())
        return _counted(len(value), "key")
    if is_table(value) or isinstance(value, (list, tuple, set, frozenset)):
        return _counted(len(value), "row" if is_table(value) else "item")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value) if isinstance(value, (dt.date, dt.time, decimal.Decimal, uuid.UUID)) else repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_of(value: Any, depth: int = 4) -> int:
    """About how many bytes a value holds; samples what is long and looks ``depth`` levels deep: microseconds."""
    kind = type(value)
    if kind in _PLAIN or kind is float:
        return sys.getsizeof(value)
    if kind is dict or kind is list:
        pass
    elif hasattr(value, "memory_usage") and hasattr(value, "columns"):
        return int(value.memory_usage(index=True).sum())
    elif hasattr(value, "nbytes"):
        return int(value.nbytes)
    items = value.values() if isinstance(value, Mapping) else value
    if not depth or not isinstance(value, (Mapping, list, tuple)) or not value:
        return sys.getsizeof(value, 64)
    sample = list(itertools.islice(items, 0, None, max(1, len(value) // 8)))[:8]
    return 64 + sum(size_of(item, depth - 1) for item in sample) * len(value) // len(sample)


# --------------------------------------------------------------------------------------------------- declared types


def convert(value: Any, hint: Any) -> Any:
    """A parameter's value as its declared type: JSON text of a date becomes a date, an int passes for a float.

    Raises ValueError saying what was expected. A type that JSON cannot spell (a DataFrame) is checked by isinstance.
    """
    try:
        return msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{str(error).lower()[:1]}{str(error)[1:]}") from None
    except TypeError:
        if isinstance(hint, type) and not isinstance(value, hint):
            raise ValueError(f"expected `{hint.__name__}`, got `{type(value).__name__}`") from None
        return value


def schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a declared type; ``{}``, anything, where JSON has no word for it."""
    try:
        found = msgspec.json.schema(hint)
    except TypeError:
        return {}
    return {k: v for k, v in found.items() if k != "$defs" or v}
