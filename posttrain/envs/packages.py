"""The modules that repair.py breaks: source, what it should give, and ways to break it.

Every way must change the result of a hidden case (a test tries them all). The visible cases become a test file in the
package; the hidden ones never leave the host. Next: repair.py.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One module of a package. A case is (function, arguments, result), all plain JSON."""

    name: str
    source: str
    visible: tuple[tuple[str, list[Any], Any], ...]
    hidden: tuple[tuple[str, list[Any], Any], ...]
    bugs: tuple[tuple[str, str], ...]
    """(right text, wrong text); the right text stands once in the source."""


INTERVALS = Module(
    name="intervals",
    source='''"""Intervals as [start, end] pairs; touching ones belong together."""


def merge(intervals):
    """The intervals in order, those that overlap or touch put together."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def covered(intervals):
    """Total length of what the intervals cover."""
    return sum(end - start for start, end in merge(intervals))


def gaps(intervals):
    """What lies between the merged intervals."""
    merged = merge(intervals)
    return [[a[1], b[0]] for a, b in zip(merged, merged[1:])]
''',
    visible=(
        ("merge", [[[1, 3], [5, 6]]], [[1, 3], [5, 6]]),
        ("covered", [[[0, 2], [4, 5]]], 3),
        ("gaps", [[[0, 1], [3, 4]]], [[1, 3]]),
    ),
    hidden=(
        ("merge", [[[5, 6], [1, 3], [2, 4]]], [[1, 4], [5, 6]]),
        ("merge", [[[1, 10], [2, 3]]], [[1, 10]]),
        ("merge", [[[1, 2], [2, 3]]], [[1, 3]]),
        ("merge", [[]], []),
        ("covered", [[[0, 4], [2, 6], [8, 9]]], 7),
        ("gaps", [[[6, 7], [0, 1], [3, 4]]], [[1, 3], [4, 6]]),
    ),
    bugs=(
        ("start <= merged[-1][1]", "start < merged[-1][1]"),
        ("max(merged[-1][1], end)", "end"),
        ("in sorted(intervals)", "in intervals"),
        ("for start, end in merge(intervals)", "for start, end in intervals"),
        ("[[a[1], b[0]]", "[[a[0], b[0]]"),
    ),
)

ROMAN = Module(
    name="roman",
    source='''"""Roman numerals from 1 to 3999."""

NUMERALS = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC")]
NUMERALS += [(50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def to_roman(number):
    """The numeral of a number."""
    text = ""
    for value, numeral in NUMERALS:
        while number >= value:
            text += numeral
            number -= value
    return text


def from_roman(text):
    """The number of a numeral."""
    values = {numeral: value for value, numeral in NUMERALS if len(numeral) == 1}
    total = 0
    for i, letter in enumerate(text):
        following = values[text[i + 1]] if i + 1 < len(text) else 0
        if values[letter] < following:
            total -= values[letter]
        else:
            total += values[letter]
    return total
''',
    visible=(("to_roman", [7], "VII"), ("from_roman", ["XII"], 12)),
    hidden=(
        ("to_roman", [1], "I"),
        ("to_roman", [1994], "MCMXCIV"),
        ("to_roman", [49], "XLIX"),
        ("to_roman", [3888], "MMMDCCCLXXXVIII"),
        ("from_roman", ["MCMXCIV"], 1994),
        ("from_roman", ["XLIX"], 49),
        ("from_roman", ["II"], 2),
    ),
    bugs=(
        ("while number >= value", "while number > value"),
        ('(40, "XL")', '(40, "XXXX")'),
        ("total -= values[letter]", "total += values[letter]"),
        ("values[letter] < following", "values[letter] <= following"),
    ),
)

LINES = Module(
    name="lines",
    source='''"""Lines of comma-separated values, quotes included."""


def split_line(line):
    """The fields of a line; a field in quotes may hold commas and doubled quotes."""
    fields, field, quoted, i = [], "", False, 0
    while i < len(line):
        letter = line[i]
        if quoted and letter == '"' and line[i + 1 : i + 2] == '"':
            field += '"'
            i += 1
        elif letter == '"':
            quoted = not quoted
        elif letter == "," and not quoted:
            fields.append(field)
            field = ""
        else:
            field += letter
        i += 1
    return [*fields, field]


def join_line(fields):
    """The line of some fields; quotes only where they are needed."""
    quoted = []
    for field in fields:
        if "," in field or '"' in field:
            field = '"' + field.replace('"', '""') + '"'
        quoted.append(field)
    return ",".join(quoted)
''',
    visible=(("split_line", ["a,b,c"], ["a", "b", "c"]), ("join_line", [["a", "b"]], "a,b")),
    hidden=(
        ("split_line", ['"a,b",c'], ["a,b", "c"]),
        ("split_line", ['"say ""hi""",x'], ['say "hi"', "x"]),
        ("split_line", ['"a"",b"'], ['a",b']),
        ("split_line", ["a,,"], ["a", "", ""]),
        ("split_line", ["a,b"], ["a", "b"]),
        ("join_line", [["a,b", 'x"y', ""]], '"a,b","x""y",'),
    ),
    bugs=(
        ('letter == "," and not quoted', 'letter == ","'),
        ("return [*fields, field]", "return fields"),
        ("""field.replace('"', '""')""", "field"),
        ("""            field += '"'\n            i += 1""", """            field += '"'"""),
        ("""if "," in field or '"' in field""", 'if "," in field'),
    ),
)

DATES = Module(
    name="dates",
    source='''"""Days of the Gregorian calendar, without the standard library."""

LENGTHS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


def is_leap(year):
    """Whether a year has a 29th of February."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def month_length(year, month):
    """Days of a month, January being 1."""
    return 29 if month == 2 and is_leap(year) else LENGTHS[month - 1]


def add_days(year, month, day, days):
    """The date so many days later, as [year, month, day]."""
    day += days
    while day > month_length(year, month):
        day -= month_length(year, month)
        month += 1
        if month > 12:
            year, month = year + 1, 1
    return [year, month, day]
''',
    visible=(("is_leap", [2023], False), ("add_days", [2024, 1, 1, 5], [2024, 1, 6])),
    hidden=(
        ("is_leap", [2000], True),
        ("is_leap", [1900], False),
        ("is_leap", [2024], True),
        ("month_length", [2024, 2], 29),
        ("month_length", [2023, 12], 31),
        ("add_days", [2023, 12, 31, 1], [2024, 1, 1]),
        ("add_days", [2024, 2, 28, 1], [2024, 2, 29]),
        ("add_days", [2024, 1, 1, 366], [2025, 1, 1]),
        ("add_days", [2024, 1, 1, 30], [2024, 1, 31]),
    ),
    bugs=(
        (" or year % 400 == 0", ""),
        ("year % 100 != 0 or", "year % 100 == 0 or"),
        ("LENGTHS[month - 1]", "LENGTHS[month % 12]"),
        ("while day > month_length", "while day >= month_length"),
        ("if month > 12", "if month >= 12"),
    ),
)

MONEY = Module(
    name="money",
    source='''"""Amounts in cents."""


def to_cents(text):
    """Cents of an amount such as "12.50", "3" or "-0.05"."""
    sign = -1 if text.startswith("-") else 1
    whole, _, cents = text.lstrip("-").partition(".")
    return sign * (int(whole) * 100 + int((cents + "00")[:2]))


def share(amount, people):
    """Equal parts of an amount; the first ones get the cents that are left over."""
    part, rest = divmod(amount, people)
    return [part + 1] * rest + [part] * (people - rest)


def change(amount, coins):
    """How many of each coin, the largest first."""
    counts = []
    for coin in sorted(coins, reverse=True):
        counts.append([coin, amount // coin])
        amount %= coin
    return counts
''',
    visible=(("to_cents", ["12.50"], 1250), ("share", [9, 3], [3, 3, 3]), ("change", [3, [1]], [[1, 3]])),
    hidden=(
        ("to_cents", ["3"], 300),
        ("to_cents", ["3.5"], 350),
        ("to_cents", ["-0.05"], -5),
        ("share", [10, 3], [4, 3, 3]),
        ("share", [11, 4], [3, 3, 3, 2]),
        ("change", [67, [1, 5, 25, 10]], [[25, 2], [10, 1], [5, 1], [1, 2]]),
    ),
    bugs=(
        ('(cents + "00")[:2]', 'cents or "0"'),
        ("sign * (int(whole) * 100 + int(", "(sign * int(whole) * 100 + int("),
        ("[part + 1] * rest", "[part] * rest"),
        ("sorted(coins, reverse=True)", "coins"),
        ("amount %= coin", "amount -= coin"),
    ),
)

GRID = Module(
    name="grid",
    source='''"""Grids as lists of rows."""


def transpose(grid):
    """Rows become columns."""
    return [list(column) for column in zip(*grid)]


def rotate(grid):
    """A quarter turn to the right."""
    return transpose(grid[::-1])


def neighbours(grid, row, column):
    """The values above, below, left and right of a place, in this order, where there are any."""
    found = []
    for r, c in [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]:
        if 0 <= r < len(grid) and 0 <= c < len(grid[0]):
            found.append(grid[r][c])
    return found


def multiply(a, b):
    """The product of two matrices."""
    return [[sum(x * y for x, y in zip(row, column)) for column in transpose(b)] for row in a]
''',
    visible=(("transpose", [[[1, 2]]], [[1], [2]]), ("neighbours", [[[1, 2]], 0, 0], [2])),
    hidden=(
        ("transpose", [[[1, 2, 3], [4, 5, 6]]], [[1, 4], [2, 5], [3, 6]]),
        ("rotate", [[[1, 2], [3, 4]]], [[3, 1], [4, 2]]),
        ("neighbours", [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1, 1], [2, 8, 4, 6]),
        ("neighbours", [[[1, 2, 3], [4, 5, 6]], 0, 0], [4, 2]),
        ("neighbours", [[[1, 2, 3], [4, 5, 6]], 1, 2], [3, 5]),
        ("multiply", [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[19, 22], [43, 50]]),
    ),
    bugs=(
        ("grid[::-1]", "grid"),
        ("0 <= r < len(grid)", "r < len(grid)"),
        ("c < len(grid[0])", "c < len(grid)"),
        ("column in transpose(b)", "column in b"),
        ("(row + 1, column)", "(row + 1, column + 1)"),
    ),
)

MODULES = (INTERVALS, ROMAN, LINES, DATES, MONEY, GRID)
