"""Numbers and names as a reader sees them: in figures, tables, sentences and Markdown."""

import math
import re
from typing import Any

SUPERSCRIPT = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


def format_count(value: float) -> str:
    """12000 -> 12k, 1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def format_power(value: float) -> str:
    """2e14 -> 2x10^14 with a real multiplication sign and superscripts; 1e14 -> 10^14."""
    if value <= 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = f"{value / 10**exponent:.2g}"
    power = "10" + str(exponent).translate(SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa}\u00d7{power}"


def format_significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits; powers of ten from a million on only."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e6 else text


def format_duration(seconds: float) -> str:
    """95 -> 1 min 35 s; 7260 -> 2 h 01 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.3g} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    if rounded < 48 * 3600:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 86400} d {rounded % 86400 // 3600:02d} h"


def escape_markdown(text: Any) -> str:
    """One line that Markdown shows literally, also inside a table."""
    line = re.sub(r"([\\`*\[\]<>|$~])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", line)  # inside a word it is only an underscore
