"""Real documents that every Python has: `python examples/documents.py documents.jsonl` writes one JSON line for each.

The docstrings of the standard library, read from its source without importing it, and the paragraphs of the language
reference that `help()` shows; those of 80 characters or more.
"""

import argparse
import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST_CHARACTERS = 80
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}


def documents() -> Iterator[dict[str, str]]:
    """Records with an `id` of their own and a `text`, in the same order at every call."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).with_suffix("")
        if not NOT_LIBRARY.intersection(place.parts):
            yield from docstrings(path, ".".join(place.parts))
    for topic, text in sorted(topics.items()):
        for number, paragraph in enumerate(text.split("\n\n")):
            if len(paragraph.strip()) >= SHORTEST_CHARACTERS:
                yield {"id": f"help:{topic}:{number}", "text": paragraph.strip()}


def docstrings(path: Path, module: str) -> Iterator[dict[str, str]]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates of code
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST_CHARACTERS:
                name = "" if isinstance(node, ast.Module) else f":{node.name}:{node.lineno}"
                yield {"id": f"{module}{name}", "text": text}


def main() -> None:
    options = argparse.ArgumentParser(description="Write the documents that every Python has as JSONL.")
    options.add_argument("file", type=Path)
    options.add_argument("--count", type=int, help="only so many")
    arguments = options.parse_args()
    lines = [json.dumps(one, ensure_ascii=False) for one in islice(documents(), arguments.count)]
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines):,} documents, {arguments.file.stat().st_size:,} bytes: {arguments.file}")


if __name__ == "__main__":
    main()
