"""The progress of a run: metrics.jsonl in its folder, with one JSON object per line. logbook.py writes the file,
launch.py and bench.py read it, and docs/formats.md describes it. This file works alone; it needs Python only.
"""
import json
import math

FILE = "metrics.jsonl"
LARGEST_STEP = 10 ** 12


def as_line(kind, step, values):
    """A line (bytes) of metrics.jsonl. values: {name: number, text or None}; None is left out, and a number that is not
    finite is written as null."""
    values = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in values.items() if value is not None}
    return json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"


def parse(line):
    """A line (bytes) -> {"kind": a text, "step": a whole number, name: a finite number, a text or None, ...}. Values of
    other types are left out. Returns None if the line is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of 5000 digits; nested too deeply
        return None
    if not isinstance(found, dict) or type(found.get("kind")) is not str:
        return None
    if type(found.get("step")) is not int or not 0 <= found["step"] < LARGEST_STEP:
        return None
    return {name: value for name, value in found.items() if value is None or type(value) is str
            or type(value) is int and abs(value) < 1 << 53 or type(value) is float and math.isfinite(value)}
