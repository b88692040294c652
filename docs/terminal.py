"""A picture of terminal output: colours as they were, no external resources.

python -m callready.verify inventories/lab --color=yes | python docs/terminal.py > docs/demo.svg

Drawn is what follows the line in which pytest counts the checks.
"""

import re
import sys
from collections.abc import Iterator
from xml.sax.saxutils import escape

SIZE, WIDTH, HEIGHT, MARGIN = 14, 8.4, 19, 16  # of the font, a character, a line, the edge; pixels
COLOURS = {"31": "#ff7b72", "32": "#56d364"}
SEQUENCE = re.compile(r"\x1b\[([\d;]*)m")


def runs(line: str) -> Iterator[tuple[int, str, str]]:
    """The pieces of a line that look alike: column, text, attributes (ECMA-48, 8.3.117 SGR)."""
    column, style = 0, dict[str, str]()
    parts = SEQUENCE.split(line)
    for text, codes in zip(parts[::2], [*parts[1::2], ""], strict=True):
        for piece in re.finditer(r"\S+(?: \S+)*", text):
            attributes = "".join(f' {key}="{value}"' for key, value in style.items())
            yield column + piece.start(), piece[0], attributes
        column += len(text)
        for code in codes.split(";"):
            if code in COLOURS:
                style["fill"] = COLOURS[code]
            elif code == "1":
                style["font-weight"] = "bold"
            elif code in ("", "0"):
                style.clear()


def picture(text: str) -> str:
    """The screen in `text` as SVG."""
    lines = text.rstrip().splitlines()
    plain = [SEQUENCE.sub("", line) for line in lines]
    counted = [
        row
        for row, line in enumerate(plain)
        if re.fullmatch(r"\d+ (passed|failed).* in [\d.]+s.*", line)
    ]
    # A blank line comes first.
    first = counted[0] + 2 if counted else 0
    lines, columns = lines[first:], max(map(len, plain[first:]))
    width, height = columns * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'font-family="ui-monospace, monospace" font-size="{SIZE}" fill="#e6edf3">',
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>',
    ]
    for row, line in enumerate(lines):
        for column, piece, attributes in runs(line):
            x, y = MARGIN + column * WIDTH, MARGIN + row * HEIGHT + SIZE
            # The length is given so that columns meet whatever the font.
            drawn.append(
                f'<text x="{x:.1f}" y="{y}" textLength="{len(piece) * WIDTH:.1f}"'
                f"{attributes}>{escape(piece)}</text>"
            )
    return "\n".join([*drawn, "</svg>", ""])


if __name__ == "__main__":
    sys.stdout.write(picture(sys.stdin.read()))
