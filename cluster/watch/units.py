"""Figures as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`85 ms`, `7.5 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1e3:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    for unit, size, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"


def ago(seconds: float) -> str:
    """`now`, `42 s ago`, `2 h 5 min ago`."""
    return "now" if seconds < 0.9995 else f"{duration(seconds)} ago"


def rate(per_second: float, unit: str) -> str:
    """`13.3 steps/s`, `1.2 M tokens/s`; slow ones as seconds each: `4.2 s/step`."""
    if unit == "steps" and 0 < per_second < 0.5:
        return f"{duration(1 / per_second)}/step"
    for name, size in (("G ", 1e9), ("M ", 1e6), ("k ", 1e4)):
        if per_second >= size:
            return f"{per_second / (1e3 if name == 'k ' else size):,.3g} {name}{unit}/s"
    return f"{per_second:,.4g} {unit}/s" if per_second >= 1000 else f"{per_second:.3g} {unit}/s"
