"""Generated pages are those that the code and the evidence give, and a stale one is noticed."""

from __future__ import annotations

import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from narrows import index

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    loader = SourceFileLoader("scripts_docs", str(ROOT / "scripts" / "docs"))
    spec = spec_from_loader("scripts_docs", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def copied(docs: ModuleType, tmp_path: Path) -> tuple[Path, dict[Path, str]]:
    """A root whose pages are all as they should be."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    text = docs.wanted(tmp_path)
    for page, told in text.items():
        page.write_text(told, encoding="utf-8")
    return tmp_path, text


def test_no_page_is_stale(docs: ModuleType):
    found = docs.stale(ROOT, docs.wanted(ROOT))
    assert not found, f"run make docs: {[p.name for p in found]}"


def test_a_changed_missing_or_left_page_is_noticed(
    docs: ModuleType, copied: tuple[Path, dict[Path, str]]
):
    root, text = copied
    assert docs.stale(root, text) == []
    methods = root / "docs" / "methods"
    changed, missing, left = methods / "snapkv.md", root / "docs" / "results.md", methods / "no.md"
    changed.write_text(changed.read_text(encoding="utf-8").replace("status", "Status", 1))
    missing.unlink()
    left.write_text("a system of the past\n")
    assert set(docs.stale(root, text)) == {changed, missing, left}


def test_every_system_and_claim_is_told(docs: ModuleType):
    from narrows.claims import prove

    text = {p.relative_to(ROOT).as_posix(): t for p, t in docs.wanted(ROOT).items()}
    listed = text["docs/methods/README.md"]
    for entry in index.entries():
        assert f"| {entry.key} |" in listed or f"[{entry.key}]({entry.key}.md)" in listed
    for entry in index.built():
        page = text[f"docs/methods/{entry.key}.md"]
        for claim in prove.claims(entry.key):
            assert f"| {claim.name.replace('_', ' ')} |" in page
            assert f"| {claim.name.replace('_', ' ')} |" in text["docs/results.md"]
