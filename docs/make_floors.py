"""The map of the packages on the architecture page.

    python docs/make_floors.py

Reads `FLOORS` in tests/repository/test_public.py and writes docs/assets/floors.svg. A package
imports from the floors below its own only.
"""

import ast
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
SVG = ROOT / "docs" / "assets" / "floors.svg"
WIDTH, ROW, GAP, LEFT, PAD = 560, 46, 8, 44, 4
NEEDS = {
    "models": "flax",
    "flax_bridge": "flax",
    "plotting": "matplotlib",
    "training": "train",
    "inspection": "train",
    "planning": "train",
    "cli": "train",
}
"""What a package needs beyond JAX and Optax."""


def read() -> list[list[str]]:
    """The floors from the ground up, each sorted."""
    tree = ast.parse((ROOT / "tests" / "repository" / "test_public.py").read_text())
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    return [sorted(floor) for floor in ast.literal_eval(found)]


def draw(floors: list[list[str]]) -> str:
    height = len(floors) * (ROW + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="ui-sans-serif, system-ui, sans-serif" font-size="15" text-anchor="middle">',
        "<title>The packages of curvax by floors; imports go down only</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#f6f8fa"/>',
    ]
    for number, floor in enumerate(floors):
        y = GAP + (len(floors) - 1 - number) * (ROW + GAP)
        middle = y + ROW / 2 + 5
        parts.append(f'<text x="{LEFT / 2}" y="{middle}" fill="#57606a">{number}</text>')
        unit = (WIDTH - LEFT - GAP * len(floor)) / sum(len(name) + PAD for name in floor)
        x = float(LEFT)
        for name in floor:
            width = unit * (len(name) + PAD)
            fill, stroke = ("#fff1e0", "#e08a1e") if name in NEEDS else ("#e3eefa", "#3b82c4")
            parts += [
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" rx="6" '
                f'fill="{fill}" stroke="{stroke}"/>',
                f'<text x="{x + width / 2:.1f}" y="{middle}" fill="#1f2328">{escape(name)}</text>',
            ]
            x += width + GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(draw(read()))
    print(SVG.relative_to(ROOT))
