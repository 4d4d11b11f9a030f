"""The text and JSON of ``stillframe show --map`` about the picture it drew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillframe.cli.text import facts, printable

if TYPE_CHECKING:
    from stillframe.api import RamMap

_COLOUR_NAMES = {
    "missing": "dark red",
    "never_populated": "grey",
    "zero": "black",
    "data": "amber",
    "unchanged": "blue",
    "saved_by_fault": "magenta",
}


def map_object(file: str, drawn: RamMap) -> dict[str, Any]:
    return {
        "file": file,
        "width": drawn.width,
        "height": drawn.height,
        "pages_per_pixel": drawn.pages_per_pixel,
        "pages": drawn.pages,
        "parts": [
            {
                "row": row,
                "gpa": part.gpa,
                "length_bytes": part.length_bytes,
                "idstr": part.idstr,
                "offset_bytes": part.offset_bytes,
            }
            for row, part in drawn.parts
        ],
    }


def map_lines(file: str, drawn: RamMap) -> list[str]:
    scale = f", {drawn.pages_per_pixel} pages a pixel" if drawn.pages_per_pixel > 1 else ""
    legend = ", ".join(
        f"{_COLOUR_NAMES[name]} {name.replace('_', ' ')} ({count} pages)"
        for name, count in drawn.pages.items()
        if count
    )
    rows = (
        (f"row {row}", f"{part.gpa:#x}, {printable(part.idstr)} at {part.offset_bytes:#x}")
        for row, part in drawn.parts
    )
    return facts([("map", f"{file}: {drawn.width} x {drawn.height}{scale}"), ("", legend), *rows])
