"""Reads values in Thrift's compact protocol, in which parquet writes its footer and the headers of pages."""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 32  # of structs and lists in each other; parquet needs 8
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12


def read_struct(data: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of the struct at a byte, by their numbers, and the byte behind it.

    Values are int, bool, memoryview, list or dict; None for the kinds that parquet doesn't have.

    Raises ValueError or IndexError if there is no struct.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"structs in structs at byte {at:,}")
    number, found = 0, dict[int, Any]()
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        if kind & 15 in (_TRUE, _FALSE):  # the kind is the value
            found[number] = kind & 15 == _TRUE
        else:
            found[number], at = _value(data, at, kind & 15, depth)
    return found, at + 1


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(data, at)
    if kind == _BINARY:
        length, at = _unsigned(data, at)
        return data[at : at + length], at + length
    if kind == _STRUCT:
        return read_struct(data, at, depth + 1)
    if kind in _LISTS:
        return _list(data, at, depth + 1)
    if kind in (_TRUE, _FALSE, _BYTE):
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    raise ValueError(f"a value of kind {kind} at byte {at:,}")  # parquet has no maps


def _list(data: memoryview, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"lists in lists at byte {at:,}")
    head, at = data[at], at + 1
    length = head >> 4
    if length == 15:
        length, at = _unsigned(data, at)
    found = []
    for _ in range(length):
        value, at = _value(data, at, head & 15, depth)
        found.append(value)
    return found, at


def _integer(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"no number at byte {at:,}")
