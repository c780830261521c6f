"""The index, the files and the claims agree; the search finds what people ask for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from narrows import index
from narrows.core.errors import NarrowsError

PACKAGE = Path(index.__file__).parent
FAMILIES = {
    "kv", "attention", "mixers", "decoding", "serving", "parallel", "network", "optim", "offload",
    "compress", "edge", "vision", "information", "concepts", "spiking", "chips", "search",
    "learned", "environments", "quantum",
}  # fmt: skip
OWN = index._own()


def _class(path: Path, name: str) -> ast.ClassDef | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _constant(node: ast.ClassDef, name: str) -> object:
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        value = getattr(line, "value", None)
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return value.value if isinstance(value, ast.Constant) else None
    return None


def test_all_ninety_six_are_there_once() -> None:
    assert len(OWN) == 96
    assert len({e.key for e in OWN}) == len({e.title for e in OWN}) == len({e.paper for e in OWN})
    assert {e.folder for e in OWN} == FAMILIES


@pytest.mark.parametrize("entry", OWN, ids=lambda e: e.key)
def test_rows_are_well_formed(entry: index.Entry) -> None:
    assert entry.key.isidentifier()
    assert entry.key == entry.key.lower()
    assert entry.what.endswith(".")
    assert entry.what[0].isupper()
    assert 40 < len(entry.what) <= 160, "one plain sentence"
    assert len(set(entry.narrow_points)) == len(entry.narrow_points)
    assert entry.paper == "" or entry.url.startswith("https://arxiv.org/abs/")
    assert index.status(entry) in ("planned", "built", "works", "proven")
    assert (index.status(entry) == "planned") != index.is_built(entry)


@pytest.mark.parametrize("entry", [e for e in OWN if e.target], ids=lambda e: e.key)
def test_targets_exist_and_define_the_method(entry: index.Entry) -> None:
    module, _, name = entry.target.partition(":")
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    assert module == f"narrows.{entry.folder}.{entry.key}"
    assert path.is_file(), f"{entry.key} is in the index, but {path.name} is not there"
    found = _class(path, name)
    assert found is not None, f"{path.name} defines no class {name}"
    assert _constant(found, "key") == entry.key
    assert entry.paper.removeprefix("arXiv:") in str(_constant(found, "paper"))
    assert _constant(found, "relieves") == entry.relieves


def test_every_method_in_the_families_is_in_the_index() -> None:
    targets = {e.target for e in OWN if e.target}
    for folder in FAMILIES:
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and _constant(node, "paper"):
                    target = f"narrows.{folder}.{path.stem}:{node.name}"
                    assert target in targets, f"{target} has no row in index.toml"


def test_claims_belong_to_built_systems() -> None:
    claims = PACKAGE / "claims"
    written = {p.stem for p in claims.glob("*.py") if not p.name.startswith("_")} - {"prove"}
    assert written <= {e.key for e in OWN if e.target}
    if written:
        assert {e.key for e in OWN if e.target} <= written


def test_get_suggests_and_load_refuses_what_is_planned() -> None:
    assert index.get("kivi").folder == "kv"
    with pytest.raises(NarrowsError, match="did you mean snapkv"):
        index.get("snapkw")
    planned = next(e for e in OWN if index.status(e) == "planned")
    with pytest.raises(NarrowsError, match="planned"):
        index.load(planned.key)
    with pytest.raises(NarrowsError, match="role"):
        index.built("tecnique")


def test_built_can_be_loaded() -> None:
    for entry in index.built():
        assert index.load(entry.key).key == entry.key


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("what helps against KV cache bytes?", {"folder": "kv"}),
        ("kv", {"folder": "kv"}),
        ("SnapKV", {"key": "snapkv"}),
        ("simulators of quantum networks", {"key": "sequence_sim"}),
        ("stragglers", {"key": "gradient_coding"}),
        ("quantisation of transformers", {"key": "repquant"}),
        ("QUANTIZATION transformer", {"key": "repquant"}),
        ("pipeline bubbles", {"relieves": "scheduling"}),
        ("power", {"relieves": "power"}),
        ("expert placement", {"key": "exflow"}),
    ],
)
def test_search_ranks_what_was_asked_first(words: str, first: dict[str, str]) -> None:
    found = index.search(words)[0]
    assert {name: getattr(found, name) for name in first} == first


def test_search_ranks_the_whole_kv_family_before_others() -> None:
    keys = [e.key for e in index.search("what helps against KV cache bytes?")]
    family = {e.key for e in OWN if e.folder == "kv"}
    assert set(keys[: len(family)]) == family


def test_search_of_nothing_and_of_nonsense() -> None:
    assert index.search("") == list(index.entries())
    assert index.search("what should I use?") == list(index.entries())
    assert index.search("zzxqy") == []


def test_other_packages_add_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    mine = index.Entry(
        "mine", "Mine", "kv", "technique", ("compute",), "Does it.", target="json:JSON"
    )
    points = [_Point([mine]), _Point([index.get("kivi")]), _Point(ImportError("broken"))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    index._others.cache_clear()
    try:
        with pytest.warns(UserWarning, match="narrows.methods") as warned:
            assert index.entries()[-1] is mine
        assert len(warned) == 2, "a taken key and a broken package are told, and left out"
        assert len(index.entries()) == 97
        assert index.status(mine) == "built"
        with pytest.raises(NarrowsError, match="index is wrong"):
            index.load("mine")
    finally:
        index._others.cache_clear()


class _Point:
    value = "package:ENTRIES"

    def __init__(self, given: object) -> None:
        self.given = given

    def load(self) -> object:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def test_wrong_words_are_refused() -> None:
    with pytest.raises(NarrowsError, match="narrow point"):
        index.Entry("x", "X", "kv", "technique", ("speed",), "Does.")
    with pytest.raises(NarrowsError, match="role"):
        index.Entry("x", "X", "kv", "tool", ("compute",), "Does.")


def test_listing_imports_no_method_and_nothing_heavy() -> None:
    code = (
        "import sys; from narrows import index; index.entries(); index.search('kv cache');"
        "heavy = {'torch', 'numpy', 'transformers', 'pandas'} & set(sys.modules);"
        "methods = [m for m in sys.modules if m.startswith('narrows.') and m.count('.') == 2"
        " and not m.startswith('narrows.core')];"
        "assert not heavy, heavy; assert not methods, methods"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
