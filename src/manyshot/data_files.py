"""Rows from wherever people keep them: jsonl, json, csv, tsv, parquet, a folder of those, a Hub id, or a demo family.

Local JSON and CSV are read here, line by line, because a user needs the line that is broken, and because the cells of
a CSV file are text: a reader that guesses types would train on 1.5 where the file says 1.50.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyshot.demo import generate
from manyshot.errors import DataError, suggestion

Row = dict[str, Any]
MISSING = object()
# JSON's way to write half of a character, be its other half there or not
HALF = re.compile(r"\\u[dD][89a-fA-F]")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# a packed file may unpack to so much, or to so many times its size; a row without columns counts as well
UNPACKED_BYTES, UNPACKED_TIMES, ROW_BYTES = 2**28, 1000, 64
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


def lookup(row: Row, column: str) -> object:
    """The value of a column, or MISSING. A dotted name that is no column reaches into objects, and lists by number."""
    if column in row:
        return row[column]
    node: object = row
    for part in column.split("."):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list | tuple) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return MISSING
    return node


def read_splits(source: str, subset: str | None, seed: int, task: str) -> dict[str, list[Row]]:
    """All splits that `source` brings: {"train": rows} at least, "validation" and "test" where it has them.

    Raises DataError naming the task, the file and, for JSON lines, the line.
    """
    if source.startswith("demo:"):
        return _generate(source, seed, task)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, task)
    if path.exists() or source.endswith(SUFFIXES):
        return {"train": read_file(path, task)}
    return _read_hub(source, subset, task)


def read_split(source: str, subset: str | None, split: str | None, seed: int, task: str, default: str) -> Sequence[Row]:
    """The rows of one split of `source`; of the split `default` where none is named. A file is one split itself.

    The rows of a Hub data set are read when they are looked at. Raises DataError naming task, source and split.
    """
    name, path = split or default, Path(source)
    if source.startswith("demo:"):
        return _one_of(_generate(source, seed, task), name, f"task '{task}': data '{source}'")
    if path.is_dir():
        return _read_folder_split(path, name, task)
    if path.exists() or source.endswith(SUFFIXES):
        if split is not None:
            raise DataError(f"task '{task}': {path}: is one file and has no splits to name; leave out split: {split}")
        return read_file(path, task)
    rows: Sequence[Row] = _load_hub(source, subset, name, task)
    return rows


def _one_of(splits: dict[str, list[Row]], name: str, where: str) -> list[Row]:
    if name not in splits:
        raise DataError(f"{where} has no split '{name}'{suggestion(name, splits)}")
    return splits[name]


def _generate(source: str, seed: int, task: str) -> dict[str, list[Row]]:
    try:
        splits = generate(source.removeprefix("demo:"), seed)
    except ValueError as error:
        raise DataError(f"task '{task}': {error}") from None
    return {split: [dict(row) for row in rows] for split, rows in splits.items()}


def read_file(path: Path, task: str) -> list[Row]:
    """The rows of one data file. Raises DataError for a missing, empty, damaged or unknown file."""
    if not path.exists():
        raise DataError(f"task '{task}': no such data file: {path}")
    if not path.is_file():  # a pipe or a device has no end
        raise DataError(f"task '{task}': {path}: is no regular file")
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path, task)
    elif path.suffix == ".json":
        rows = _read_json(path, task)
    elif path.suffix in (".csv", ".tsv"):
        rows = _read_csv(path, task)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path, task)
    else:
        raise DataError(f"task '{task}': {path}: unknown kind of file '{path.suffix}'; known are {', '.join(SUFFIXES)}")
    if not rows:
        raise DataError(f"task '{task}': {path}: the split is empty")
    return rows


def _read_bytes(path: Path) -> bytes:
    """The file without the byte order mark that some editors put before UTF-8."""
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf")


def _loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for all that is none, half a character (a cut emoji) included."""
    value = json.loads(text)
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(f"half a character, \\u{half:04x}, which no tokenizer reads") from None
    return value


def _read_jsonl(path: Path, task: str) -> list[Row]:
    rows = []
    for number, blob in enumerate(_read_bytes(path).split(b"\n"), start=1):
        where = f"task '{task}': {path}, line {number}"
        if not blob.strip():
            continue
        try:
            row = _loads(blob.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 (byte {error.start} is 0x{blob[error.start]:02x})") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}); is the line cut off?"
            ) from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise DataError(f"{where}: cannot be read ({error})") from None
        rows.append(_checked(row, where))
    return rows


def _read_json(path: Path, task: str) -> list[Row]:
    where = f"task '{task}': {path}"
    try:
        value = _loads(_read_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of objects, found {type(value).__name__}; for JSON lines use .jsonl")
    return [_checked(row, f"{where}, item {number}") for number, row in enumerate(value, start=1)]


def _checked(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, found {type(row).__name__}")
    return row


def _read_csv(path: Path, task: str) -> list[Row]:
    """Rows of text cells by column; an empty cell is a missing value."""
    try:
        text = _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"task '{task}': {path}: not UTF-8 ({error})") from None
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) != len(columns):
                raise DataError(
                    f"task '{task}': {path}, line {reader.line_num}: {len(cells)} cells for {len(columns)} columns"
                )
            rows.append({column: cell or None for column, cell in zip(columns, cells, strict=True)})
    except csv.Error as error:
        raise DataError(f"task '{task}': {path}, line {reader.line_num}: not valid CSV ({error})") from None
    return rows


def _read_parquet(path: Path, task: str) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    rows: list[Row] = []
    unpacked, most = 0, max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                unpacked += batch.nbytes + ROW_BYTES * batch.num_rows
                if unpacked > most:
                    raise DataError(
                        f"task '{task}': {path}: unpacks to more than {most / 1e9:.1f} GB, {UNPACKED_TIMES} times its "
                        "size and more: no data set does. Write its rows as JSON lines if it is meant so"
                    )
                rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"task '{task}': {path}: cannot be read ({type(error).__name__}: {error})") from None
    return rows


def _read_folder(path: Path, task: str) -> dict[str, list[Row]]:
    """A folder with one file per split, named after it: train.jsonl, validation.csv, math.test.parquet, …"""
    files = _data_files(path)
    splits = {}
    for split in SPLIT_NAMES:
        if matches := _files_of(files, split):
            splits[split] = [row for file in matches for row in read_file(file, task)]
    if "train" not in splits:
        splits["train"] = _read_folder_split(path, "train", task)
    return splits


def _read_folder_split(path: Path, split: str, task: str) -> list[Row]:
    """The files of a folder that are named after a split; a folder's only file is its training split."""
    files = _data_files(path)
    matches = _files_of(files, split) or (files if split == "train" and len(files) == 1 else [])
    if not matches:
        which = "the training split" if split == "train" else f"the split '{split}'"
        raise DataError(
            f"task '{task}': {path}: no file for {which}; expected {split}{{{','.join(SUFFIXES)}}}, "
            f"found {', '.join(file.name for file in files) or 'no data file'}"
        )
    return [row for file in matches for row in read_file(file, task)]


def _data_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)


def _files_of(files: list[Path], split: str) -> list[Path]:
    names = set(SPLIT_NAMES.get(split, (split.lower(),)))
    return [file for file in files if set(file.stem.lower().replace("-", ".").split(".")) & names]


def _read_hub(source: str, subset: str | None, task: str) -> dict[str, list[Row]]:
    found = _load_hub(source, subset, None, task)
    splits = {}
    for split, names in SPLIT_NAMES.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            splits[split] = found[name].to_list()
    if "train" not in splits:
        raise DataError(f"task '{task}': data '{source}' has no training split; it has {', '.join(found)}")
    return splits


def _load_hub(source: str, subset: str | None, split: str | None, task: str) -> Any:
    """A Hub data set, or one split of it. Raises DataError with what the library said."""
    from datasets import load_dataset

    try:
        return load_dataset(source, subset, split=split)
    except Exception as error:  # noqa: BLE001 - network, authentication and format errors have many types
        which = f"data '{source}'" + (f", split '{split}'," if split is not None else "")
        raise DataError(
            f"task '{task}': {which} is no local file and could not be loaded from the Hub "
            f"({type(error).__name__}: {error}). Check the name, the network, or give a local file"
        ) from None
