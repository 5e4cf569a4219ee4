"""Boxes, arrows and words as SVG that is readable on light and dark pages: each picture has a ground of its own."""

from xml.sax.saxutils import escape

_STYLE = """\
<style>
text{font:14px system-ui,sans-serif;fill:#1f2328}.small{font-size:12px;fill:#57606a}.head{font-weight:600}
.code{font:12px ui-monospace,monospace}.middle{text-anchor:middle}.end{text-anchor:end}
.ground{fill:#fff;stroke:#d0d7de}.box{fill:#f6f8fa;stroke:#57606a}.user{fill:#ddf4ff;stroke:#0969da}
.service{fill:#dafbe1;stroke:#1a7f37}.wall{fill:#fff1e5;stroke:#bc4c00}
.line{stroke:#57606a;fill:none;stroke-width:1.5}.control{stroke:#8250df;fill:none;stroke-width:2.5}
.data{stroke:#0969da;fill:none;stroke-width:2}.idle{stroke:#0969da;fill:none;stroke-width:1.5;stroke-dasharray:6 4}
.faint{stroke:#afb8c1;fill:none;stroke-dasharray:2 4}.tip-line{fill:#57606a}.tip-control{fill:#8250df}
.tip-data,.tip-idle{fill:#0969da}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.ground{fill:#0d1117;stroke:#3d444d}
.box{fill:#151b23;stroke:#9198a1}.user{fill:#121d2f;stroke:#4493f8}.service{fill:#12261e;stroke:#3fb950}
.wall{fill:#2b1d10;stroke:#db6d28}.line{stroke:#9198a1}.control{stroke:#ab7df8}.data,.idle{stroke:#4493f8}
.faint{stroke:#3d444d}.tip-line{fill:#9198a1}.tip-control{fill:#ab7df8}.tip-data,.tip-idle{fill:#4493f8}}
</style>
"""


class Canvas:
    """One picture; what is drawn later lies above."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size, self._title = (width, height), title
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box") -> None:
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>')

    def text(self, x: float, y: float, words: str, kind: str = "middle") -> None:
        """Write at a point: its middle, or its beginning where `kind` has no `middle` or `end`."""
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        self._parts.append(f'<path class="{kind}" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line", *, both: bool = False) -> None:
        """Draw a line with a tip at its end, or at both."""
        self.line(x1, y1, x2, y2, kind)
        self._tip(x1, y1, x2, y2, kind)
        if both:
            self._tip(x2, y2, x1, y1, kind)

    def _tip(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        left, right = (
            (x2 - 10 * dx - 4.5 * dy, y2 - 10 * dy + 4.5 * dx),
            (x2 - 10 * dx + 4.5 * dy, y2 - 10 * dy - 4.5 * dx),
        )
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x2, y2), left, right))
        self._parts.append(f'<polygon class="tip-{kind}" points="{points}"/>')

    def svg(self) -> str:
        width, height = self._size
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(self._title)}</title>\n'
        ground = f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        return head + _STYLE + ground + "\n".join(self._parts) + "\n</svg>\n"
