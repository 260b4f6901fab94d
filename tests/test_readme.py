"""The README says what happens: its Python runs and prints what it shows, its commands exist, its numbers are ours."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from cir_jax.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_prints_what_the_readme_shows():
    (program,) = blocks("python")
    (expected,) = blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    # Scores may differ in the last digit from machine to machine.
    score = re.compile(r"score=([0-9.]+)")
    assert score.sub("", printed.getvalue()) == score.sub("", expected)
    for ours, shown in zip(score.findall(printed.getvalue()), score.findall(expected), strict=True):
        assert float(ours) == pytest.approx(float(shown), abs=2e-3)


def test_every_command_in_the_readme_exists():
    named = set(re.findall(r"python -m cir_jax\.([a-z0-9_.]+)", README))
    assert set(COMMANDS) <= named
    for name in named:
        place = ROOT / "cir_jax" / name.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_two_commands_are_marked_for_the_gate():
    for mark in ("demo command", "test command"):
        assert len(re.findall(rf"<!-- {mark} -->\n```\npython3 -m venv .*\n```", README)) == 1
    gate = (ROOT / ".ci" / "run").read_text()
    (extract,) = re.findall(r"^test_command=\$\((.*)\)$", gate, re.MULTILINE)
    found = subprocess.run(
        extract, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("python3 -m venv .venv-test")
    assert found.stdout.rstrip().endswith("pytest -q -n 2")


def test_the_table_is_that_of_the_packaged_model():
    """The README's table was printed by the model in the package."""
    manifest = ROOT / "cir_jax" / "weights" / "emoji_text" / "manifest.json"
    assert json.loads(manifest.read_text())["fingerprint"] in README
