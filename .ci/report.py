"""A report of `pip install --dry-run --report` ↦ what pip would add, which must replace nothing.

    python .ci/report.py REPORT ASKED

Fails where the report installs another version of a project that is here and that Colab's runtime
has too: JAX, whose plugin for the GPU or TPU would stay behind, and what is built upon it.
"""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PINS = Path(__file__).parents[1] / "tests" / "colab.txt"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def here(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


report, asked = sys.argv[1:]
found = (entry["metadata"] for entry in json.loads(Path(report).read_text())["install"])
new = {plain(one["name"]): one["version"] for one in found}
kept = {plain(name) for name in re.findall(r"^([\w-]+)==", PINS.read_text(), re.M)}
print(f"  pip install '{asked}' adds", *(f"{name}=={new[name]}" for name in sorted(new)))
replaced = [f"{name} {here(name)} by {new[name]}" for name in sorted(kept & set(new)) if here(name)]
if replaced:
    sys.exit(f"pip install '{asked}' replaces {', '.join(replaced)}")
