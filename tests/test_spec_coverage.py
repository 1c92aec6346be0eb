"""docs/spec-coverage.md names only files and tests that exist, and leaves out no section and no defect."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "spec-coverage.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and "`" in line]
NAMED = re.compile(r"`([^`]+)`")


def functions_in(name: str) -> list[str]:
    return re.findall(r"^(?:async )?def (test_\w+)", (ROOT / "tests" / name).read_text(), re.MULTILINE)


def references(row: str) -> list[tuple[str, str]]:
    """(file, pattern of a test name) of a row; `…::name` is of the file named before."""
    found: list[tuple[str, str]] = []
    for name in NAMED.findall(row):
        file, _, test = name.partition("::")
        if file.startswith("test_"):
            found.append((file, test))
        elif file == "…" and test:
            found.append((found[-1][0], test))
    return found


def missing() -> list[str]:
    faults = []
    for row in ROWS:
        files = [name for name in NAMED.findall(row) if "/" in name and name.endswith(".py")]
        faults += [name for name in files if not (ROOT / name).exists()]
        for file, test in references(row):
            if not (ROOT / "tests" / file).exists():
                faults.append(file)
                continue
            pattern = test.split("[")[0].replace("…", "*")
            if test and not any(fnmatchcase(name, pattern) for name in functions_in(file)):
                faults.append(f"{file}::{test}")
    return faults


def test_every_file_and_test_named_exists() -> None:
    assert sum(len(references(row)) for row in ROWS) > 80
    assert missing() == []


def test_no_section_and_no_defect_is_left_out() -> None:
    first = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("|")]
    named = {part.strip() for cell in first for part in cell.split(",")}
    sections = {".".join(part.split(".")[:2]) for part in named}
    assert {f"4.{n}" for n in range(1, 14)} <= sections
    assert {f"B{n}" for n in range(1, 29)} <= named
    assert {f"10.1.{n}" for n in range(1, 10)} <= named
