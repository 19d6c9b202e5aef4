"""The results as a picture: one bar a workload, its length our time against fuse-overlayfs's, on a logarithmic scale; a tick where the
kernel's overlay stands. SVG by hand: a bar is a rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from bench.results import KERNEL, PEER, Results, Row

_LEFT, _WIDTH, _RIGHT, _ROW, _TOP, _BOTTOM = 290, 460, 60, 20, 64, 46
_SMALLEST, _LARGEST = 1 / 16, 4.0  # what lies past them is drawn at the edge; the figure beside it is exact

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .note, .scale { fill: #57606a; font-size: 11px }
  .faster { fill: #2da44e } .slower { fill: #cf222e } .kernel { fill: #0969da }
  .grid { stroke: #d0d7de } .even { stroke: #57606a; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note, .scale { fill: #8d96a0 } .grid { stroke: #30363d } .even { stroke: #8d96a0 }
  }
"""


def chart(results: Results, machine: dict[str, str], size: str) -> str:
    """An SVG document."""
    rows = [row for row in results.rows() if row.ratio_to(PEER) is not None]
    height = _TOP + _ROW * len(rows) + _BOTTOM
    width = _LEFT + _WIDTH + _RIGHT
    mean = results.mean_ratio_to(PEER)
    note = f"{machine['date']}, Linux {machine['kernel']}, {machine['processors']}, {machine['memory']}; {size} size, medians"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>pyoverlay's time divided by fuse-overlayfs's, workload by workload; geometric mean {mean:.2f}</title>",
            f"<style>{_STYLE}</style>",
            _text(12, 24, "Time of pyoverlay, where fuse-overlayfs takes 1", "title"),
            _text(12, 42, "shorter is faster; the blue tick is the kernel's overlayfs", "note"),
            *_scale(height),
            *(line for number, row in enumerate(rows) for line in _bar(row, _TOP + _ROW * number)),
            _text(12, height - 12, f"geometric mean {mean:.2f} · {note}", "note"),
            "</svg>",
            "",
        ]
    )


def _x(ratio: float) -> float:
    shown = min(max(ratio, _SMALLEST), _LARGEST)
    return _LEFT + _WIDTH * math.log(shown / _SMALLEST) / math.log(_LARGEST / _SMALLEST)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_kind}>{escape(text)}</text>'


def _scale(height: int) -> Iterator[str]:
    bottom = height - _BOTTOM + 4
    for mark, label in ((1 / 16, "1/16"), (1 / 8, "1/8"), (1 / 4, "1/4"), (1 / 2, "1/2"), (1.0, "1"), (2.0, "2"), (4.0, "4")):
        kind = "even" if mark == 1 else "grid"
        yield f'<line x1="{_x(mark):.1f}" x2="{_x(mark):.1f}" y1="{_TOP - 6}" y2="{bottom}" class="{kind}"/>'
        yield _text(_x(mark), bottom + 14, label, "scale", "middle")


def _bar(row: Row, y: int) -> Iterator[str]:
    ratio, kernel = row.ratio_to(PEER), row.ratio_to(KERNEL)
    assert ratio is not None, "rows without a ratio are not drawn"
    end = _x(ratio)
    yield _text(_LEFT - 8, y + 14, row.workload.title, anchor="end")
    kind = "slower" if ratio > 1 else "faster"
    yield f'<rect x="{_LEFT}" y="{y + 4}" width="{max(end - _LEFT, 1):.1f}" height="{_ROW - 7}" rx="2" class="{kind}"/>'
    if kernel is not None:
        yield f'<rect x="{_x(ratio / kernel) - 1:.1f}" y="{y + 1}" width="2.5" height="{_ROW - 2}" class="kernel"/>'
    yield _text(end + 6, y + 14, f"{ratio:.2f}")
