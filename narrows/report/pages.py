"""A page for every built system, and the index of all of them by narrow point, as Markdown.

All of it is taken from the module's docstring, the class, its claims and the evidence.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from narrows import index
from narrows.core.errors import NarrowsError
from narrows.core.method import Method, Technique
from narrows.evidence import PACKAGE
from narrows.report import results

WRITTEN = "Written by `scripts/docs`; change the docstrings, the claims or the evidence instead."
HURTS = re.compile(r"^(?:When (?:it hurts|not to use it)\b[.:]?\s*)|^(?=It (?:hurts|misleads)\b)")
VERBS = {"instrument": "measure", "technique": "apply", "simulator": "run", "searcher": "search"}


def sections(doc: str) -> dict[str, str]:
    """A module's docstring by what its paragraphs are about: about, narrow point, mechanism, hurts.

    A paragraph that opens no section belongs to the one before it.
    """
    found: dict[str, list[str]] = {"about": []}
    at = "about"
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        opens = re.match(r"(Narrow point|Mechanism|Paper)\b[^.:\n]*[.:]\s*", paragraph)
        hurts = HURTS.match(paragraph)
        if opens:
            at, paragraph = opens.group(1).lower(), paragraph[opens.end() :]
        elif hurts:
            at, paragraph = "hurts", paragraph[hurts.end() :]
        found.setdefault(at, []).append(_sentence(paragraph))
    return {name: "\n\n".join(paragraphs) for name, paragraphs in found.items()}


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _parameters(method: type[Method]) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())


def _default(parameter: inspect.Parameter) -> str:
    empty = parameter.default is inspect.Parameter.empty
    default = parameter.default
    if empty:
        return "..."
    # what has no short form that can be typed again is left to the class
    told = f'"{default}"' if isinstance(default, str) else repr(default)
    return told if "<" not in told and len(told) < 60 else "..."


def _usage(entry: index.Entry, method: type[Method]) -> list[str]:
    """A command where there is one, and Python with the constructor's defaults."""
    verb = VERBS[entry.role]
    shown = [p for p in _parameters(method) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    settings = ", ".join(f"{p.name}={_default(p)}" for p in shown)
    on_model = issubclass(method, Technique) and entry.relieves != "information"
    lines: list[str] = []
    if on_model:
        lines += ["```sh", f"narrows apply MODEL --with {entry.key} --save DIRECTORY", "```", ""]
    module, _, name = entry.target.partition(":")
    call = f"{name}({settings})"
    if len(call) > 80:
        inner = "".join(f"    {p.name}={_default(p)},\n" for p in shown)
        call = f"{name}(\n{inner})"
    lines += ["```python", f"from {module} import {name}", "", f"method = {call}"]
    if on_model:
        lines += ["with method.apply(model) as applied:  # any transformers decoder",
                  "    applied.model  # run this"]  # fmt: skip
    lines += ["```", ""]
    told = inspect.cleandoc(method.__doc__ or "")
    if told:
        lines += [
            "Settings, with the defaults shown:",
            "",
            *(f"> {x}".rstrip() for x in told.split("\n")),
            "",
        ]
    methods = [
        (n, f) for n, f in vars(method).items()
        if not n.startswith("_") and inspect.isfunction(inspect.unwrap(getattr(f, "__func__", f)))
    ]  # fmt: skip
    methods.sort(key=lambda item: item[0] != verb)
    if methods:
        lines += ["| call | what it does |", "| --- | --- |"]
        for n, f in methods:
            function = inspect.unwrap(getattr(f, "__func__", f))
            names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
            first = results.text((inspect.getdoc(function) or "").split("\n\n")[0])
            lines.append(f"| `{n}({', '.join(names)})` | {first} |")
        lines.append("")
    return lines


def _link(words: str) -> str:
    """arXiv identifiers as links; what is a link already stays."""
    return re.sub(
        r"(?<![\[/\w])arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", words
    )


def page(entry: index.Entry) -> str:
    """docs/methods/<key>.md of a built system."""
    method = index.load(entry.key)
    module = inspect.getmodule(method)
    told = sections((module.__doc__ if module else "") or "")
    found = results.rows(entry.key)
    paper = f"[{entry.paper}]({entry.url})" if entry.url else entry.paper
    lines = [
        f"# {entry.key}", "",
        f"**{entry.title}** · {paper} · {entry.role} · status: **{index.status(entry)}**", "",
        f"{entry.what}", "",
        _link(told["about"]), "",
        "## The narrow point", "",
        f"*{', '.join(entry.narrow_points)}*", "",
    ]  # fmt: skip
    if "narrow point" in told:
        lines += [told["narrow point"], ""]
    if "mechanism" in told:
        lines += ["## How it works", "", told["mechanism"], ""]
    lines += ["## How to use it", "", *_usage(entry, method)]
    price = getattr(method, "price", None)
    if "hurts" in told or price is not None:
        lines += ["## When it hurts", ""]
        if "hurts" in told:
            lines += [told["hurts"], ""]
        if price is not None:
            lines += [f"- Quality: {price.quality}", f"- Training: {price.training}",
                      f"- Memory: {price.memory}", ""]  # fmt: skip
    lines += ["## Claims", "", results.summary(found), "", *results.table(found), ""]
    why = list(results.reasons(found))
    if why:
        lines += ["Why some are not reproduced, or wait:", "", *why, ""]
    lines += [
        f"Settings, tolerances, evidence: [results](../results.md#{entry.key}). Run again:", "",
        "```sh", f"narrows prove {entry.key}", "```", "",
        "## Sources", "",
        f"- Paper: {_link(told['paper']) if 'paper' in told else paper}",
    ]  # fmt: skip
    source = entry.target.partition(":")[0].replace(".", "/") + ".py"
    claims = f"narrows/claims/{entry.key}.py"
    lines += [f"- Method: [{source}](../../{source})", f"- Claims: [{claims}](../../{claims})", ""]
    return "\n".join([*lines, WRITTEN]).rstrip() + "\n"


def contents(entries: tuple[index.Entry, ...], shown: set[str]) -> str:
    """docs/methods/README.md: all systems under the narrow point that each widens first."""
    lines = [
        "# Systems", "",
        f"{len(entries)} published systems by the narrow point that each widens or measures first;",
        "a link leads to the page of one that is built. `narrows methods WORDS` searches them.", "",
        "*planned*: not built. *built*: some claim was not run, is inconclusive, waits for a GPU",
        "or misses without a reason. *works*: all run, each miss has its reason. *proven*: all",
        "reproduced. Every figure: [results](../results.md).", "",
    ]  # fmt: skip
    for point, meaning in index.NARROW_POINTS.items():
        own = sorted((e for e in entries if e.relieves == point), key=lambda e: e.key)
        if not own:
            continue
        also = [e for e in entries if point in e.narrow_points[1:] and e.key in shown]
        lines += [f"## {_sentence(point)}", "", f"{_sentence(meaning)}.", ""]
        lines += ["| system | what it does | role | status |", "| --- | --- | --- | --- |"]
        for e in own:
            cell = f"[{e.key}]({e.key}.md)" if e.key in shown else e.key
            lines.append(f"| {cell} | {results.text(e.what)} | {e.role} | {index.status(e)} |")
        if also:
            links = ", ".join(f"[{e.key}]({e.key}.md)" for e in sorted(also, key=lambda e: e.key))
            lines += ["", f"Built and helpful here as well: {links}."]
        lines.append("")
    return "\n".join([*lines, WRITTEN]).rstrip() + "\n"


def pages(root: Path) -> dict[Path, str]:
    """All pages of methods and results of a checkout; its own systems only, not other packages'."""
    if not (root / "docs").is_dir():
        raise NarrowsError(f"{root} is no checkout of narrows: it has no docs folder")
    entries = tuple(e for e in index.entries() if e.target.startswith("narrows.") or not e.target)
    # a system whose claims are still to be written gets its page with them
    built = [
        e for e in entries
        if index.is_built(e) and (PACKAGE / "claims" / f"{e.key}.py").is_file()
    ]  # fmt: skip
    docs = root / "docs"
    found = {docs / "methods" / f"{e.key}.md": page(e) for e in built}
    found[docs / "methods" / "README.md"] = contents(entries, {e.key for e in built})
    found[docs / "results.md"] = results.page(built)
    return found
