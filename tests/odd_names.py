"""Names that end programs which take them for something else than text."""

import os

# Every kind of name that a file system or a JSON file can hold.
NAMES = {
    "dollars": "Ba$$in",
    "mathtext": "Ba$$in $x_1^{2}$ \\frac{a",
    "markup": "[bold]red[/] [/] [link=x]",
    "a table's": "a|b `c` *d* _e_ <f>",
    "hidden": "_e_",
    "percent": "100% %s {0} {x!r}",
    "lines": "a\nb\r\nc\td\x0b\x0c\x85\u2028e",
    "terminal": "\x1b[31mred\x1b[0m\x07\x9b2J",
    "bytes": os.fsdecode(b"caf\xe9 \xff"),
    "half a pair": "\ud83d and \ude00",
    "emoji": "🐱 👩‍🔬 :cat:",
    "CJK": "日本語のクラス",
    "right to left": "עברית العربية",
    "turned": "a\u202egnp.b\u2066c",
    "combining": "e\u0301\u0323\u0334 ",
    "nothing": "",
    "long": "a rather long name " * 26,
}
