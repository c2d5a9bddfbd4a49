"""Bytes and arrays, wherever they live; nothing here knows a cell."""
