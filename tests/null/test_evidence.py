"""Evidence: fingerprints that notice what matters, files that survive, verdicts and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narrows import evidence
from narrows.claims import prove
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.evidence import Evidence, Result


def made(compute, **changes):
    given = {"expected": 2.0, "unit": "x", "setting": "s", "source": "here", "how": "exact",
             "tolerance": 0.1}  # fmt: skip
    return claim(**{**given, **changes})(compute)


def raises():
    raise ZeroDivisionError("no rows")


def unclear():
    raise Inconclusive("spread covers the difference")


@pytest.mark.parametrize(
    ("one", "verdict", "code"),
    [
        (made(lambda: 2.1), "reproduced", 0),
        (made(lambda: 3.0), "not-reproduced", 1),
        (made(lambda: 3.0, explained="another kernel"), "not-reproduced", 0),
        (made(lambda: 2.0, explained="another kernel"), "reproduced", 1),
        (made(raises), "not-reproduced", 1),
        (made(unclear), "inconclusive", 3),
        (made(lambda: Figure(2.0, (1.9, 2.1), predicted=2.2)), "reproduced", 0),
        (made(lambda: 5.0, expected=(4.0, float("inf"))), "reproduced", 0),
    ],
)
def test_verdicts_and_exit_codes(one, verdict: str, code: int):
    result = prove.judge(one)
    assert result.verdict == verdict
    found = Evidence("k", "m", "d", "s", "f", {}, "", "", (result,))
    assert prove.exit_code([found]) == code


def test_what_is_missing_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NARROWS_DATA", raising=False)
    result = prove.judge(made(lambda: 2.0, needs=("data",)))
    assert (result.verdict, "NARROWS_DATA" in result.reason) == ("inconclusive", True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evidence, "own", lambda: tmp_path)
    monkeypatch.setattr(evidence, "folders", lambda: (tmp_path,))
    return tmp_path


def counting(monkeypatch: pytest.MonkeyPatch, stop_at: str = "") -> list[str]:
    ran: list[str] = []

    def check(name: str):
        def compute() -> float:
            if name == stop_at and name not in ran:
                ran.append(name)
                raise KeyboardInterrupt
            ran.append(name)
            return 2.0

        compute.__name__ = name
        return made(compute)

    chosen = [check(n) for n in ("first", "second", "third")]
    monkeypatch.setattr(prove, "claims", lambda key: chosen)
    return ran


def test_what_stands_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    ran = counting(monkeypatch)
    prove.prove("k")
    prove.prove("k")
    assert ran == ["first", "second", "third"]
    prove.prove("k", fresh=True)
    assert len(ran) == 6
    assert len(list((folder / "k").glob("*.json"))) == 1


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    ran = counting(monkeypatch, stop_at="second")
    with pytest.raises(KeyboardInterrupt):
        prove.prove("k")
    prove.prove("k")
    assert ran == ["first", "second", "second", "third"]


def test_results_come_back_as_they_went(folder: Path):
    result = Result("c", 1, "reproduced", 1.0, "x", (0.0, float("inf")), interval=(0.9, 1.1))
    evidence.write(Evidence("k", "m", "20260101T000000Z", "s", "f" * 8, {}, "", "", (result,)))
    (found,) = evidence.read("k")
    assert found.results == (result,)


def test_files_cut_short_stand_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    counting(monkeypatch)
    prove.prove("k")
    (file,) = (folder / "k").glob("*.json")
    whole = file.read_text()
    for cut in range(0, len(whole), 97):
        file.write_text(whole[:cut])
        assert list(evidence.read("k")) == []
    file.write_text(json.dumps([1]))
    assert list(evidence.read("k")) == []


def test_a_waiting_result_does_not_displace_a_settled_one(folder: Path):
    def put(machine: str, date: str, verdict: str) -> None:
        result = Result("gpu speed", 1, verdict, 3.0, "x", 3.0)
        evidence.write(
            Evidence("k", machine, date, evidence.sources("k"), machine * 8, {}, "", "", (result,))
        )

    put("gpu", "20260101T000000Z", "reproduced")
    put("cpu", "20260102T000000Z", "needs-gpu")
    assert evidence.standing("k")["gpu speed"].verdict == "reproduced"


def test_the_fingerprint_sees_code_and_not_comments(tmp_path: Path):
    file = tmp_path / "a.py"
    seen = []
    for text in ("x = 1\n", "# why\nx = 1\n", '"""Doc."""\nx = 1\n', "x = 2\n"):
        file.write_text(text)
        evidence._code.cache_clear()
        seen.append(evidence._code(file)[0])
    assert seen[0] == seen[1] == seen[2] != seen[3]
    evidence._code.cache_clear()


def test_a_key_reaches_its_method_and_the_nouns():
    names = {f.name for f in evidence.reached("snapkv")}
    assert {"snapkv.py", "price.py", "llm.py"} <= names
    assert "cli.py" not in names
