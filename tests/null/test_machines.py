"""The catalogue of machines: complete, sane, sourced, and read back exactly as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.core.calibration import Calibration, Error
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.resource import Kind, Link, Resource
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.machines.load import CATALOGUE, catalogue, dumps, load, loads, names, save

ALL = names()

REQUIRED = {
    "h100-sxm", "h100-pcie", "h200", "a100-80", "a100-40", "v100-32", "a40", "a10", "l40s",
    "rtx-4090", "mi250x", "frontier-node", "mi300x", "sn40l", "tpu-v4", "m2-pro", "jetson-nano",
    "raspberry-pi-4", "cortex-m7", "gap8",
}  # fmt: skip

# Figures retyped here from the vendors' tables, so that an edited file cannot drift unnoticed:
# (machine, what, figure).
ANCHORS = [
    ("h100-sxm", "compute.bf16", 989.4e12), ("h100-sxm", "hbm", 3.35e12),
    ("h200", "hbm", 4.8e12), ("h200", "hbm.capacity", 141e9),
    ("a100-80", "compute.bf16", 312e12), ("a100-80", "hbm", 2.039e12),
    ("a100-80", "compute.int8", 624e12), ("a100-40", "hbm", 1.555e12),
    ("a40", "compute.bf16", 149.7e12), ("a40", "gddr", 0.696e12),
    ("v100-32", "compute.fp16", 125e12), ("mi250x", "hbm", 1.6e12),
    ("mi300x", "compute.fp8", 2614.9e12), ("tpu-v4", "compute.bf16", 275e12),
    ("l40s", "compute.bf16", 362.05e12), ("t4", "gddr", 320e9),
    ("frontier-node", "compute.bf16", 1532e12), ("sn40l", "compute.bf16", 638e12),
]  # fmt: skip


def toy(precision: str, dtype: str) -> Workload:
    """One product of (8, 64) by (64, 64) and a pass over its result."""
    tensors = {
        "w": Tensor("w", "weight", {"row": 64.0, "column": 64.0}, Codec.of(dtype)),
        "x": Tensor("x", "activation", {"token": 8.0, "channel": 64.0}, Codec.of(dtype)),
        "y": Tensor("y", "activation", {"token": 8.0, "channel": 64.0}, Codec.of(dtype)),
    }
    product = Op(
        "product", "matmul", (Use("w"), Use("x")), (Use("y"),),
        per_element={"w": 16.0}, precision=precision, shape={"m": 8, "n": 64, "k": 64},
    )  # fmt: skip
    scale = Op("scale", "pointwise", (Use("y"),), (Use("y"),), flops=512.0, precision=precision)
    return Workload("toy", tensors, (Phase("step", (product, scale)),))


def example(**changes: object) -> Machine:
    """A machine that uses every part of the form."""
    resources = {
        r.name: r
        for r in (
            Resource(
                "hbm", Kind.RATE, 1 / 3 * 1e12, "byte/s", "a 'quoted' \"source\"\nof two lines"
            ),
            Resource("l2", Kind.RATE, 7.3e12, "byte/s", "x = 1 # not a comment"),
            Resource("compute.bf16", Kind.RATE, 989.4e12, "flop/s", "ünïcode 30 % → 😀 \\ tab\t."),
            Resource("compute.int8", Kind.RATE, 1e15, "op/s"),
            Resource("hbm.capacity", Kind.LEVEL, 2.0**40 + 1, "byte"),
            Resource("l2.capacity", Kind.LEVEL, 50e6, "byte"),
            Resource("power", Kind.LEVEL, 0.1 + 0.2, "watt"),
            Resource("neck", Kind.CHANNEL, 8.0, "bit"),
        )
    }
    links = {"net": Link("net", 25e9 / 7, 1.3e-6, 8, "ring", "s"), "bus": Link("bus", 32e9)}
    fitted = {
        "matmul": Calibration(
            "matmul",
            0.71,
            0.82,
            8e-6,
            ((128, 64),),
            1044,
            "s",
            "2024",
            Error(0.05, 0.07, 1 / 7, 900),
        ),
        "all_reduce": Calibration("all_reduce", memory=0.5, fixed=2.6e-5, n=9, step=1e-6),
    }
    machine = Machine(
        "mine-1.0", "Mine", "node", resources, {"device": "hbm", "host": "bus", "peers": "net"},
        links, ("l2",), 132, fitted, 2026, "everything", "a note", "narrows.core.bound:bound",
    )  # fmt: skip
    return replace(machine, **changes)  # type: ignore[arg-type]


def test_catalogue_has_the_machines_asked_for() -> None:
    assert len(ALL) >= 24
    assert set(ALL) >= REQUIRED
    assert list(catalogue()) == ALL


@pytest.mark.parametrize("name", ALL)
def test_machine_is_sane(name: str) -> None:
    machine = load(name)
    assert machine.name == name
    assert machine.title
    assert 2010 <= machine.year <= 2030
    assert machine.units > 0
    rates = {n: r for n, r in machine.resources.items() if r.kind is Kind.RATE}
    memory = machine.bandwidth("device")
    assert machine.capacity("device") is not None
    # tiers resolve, and what is further away is not faster
    for tier in machine.tiers:
        assert machine.bandwidth(tier) > 0
        if tier in ("host", "drive"):
            assert machine.bandwidth(tier) < memory
        if tier in ("tcm", "sram"):
            assert machine.bandwidth(tier) > memory
    if "peers" in machine.tiers:
        assert machine.tiers["peers"] in machine.links
    # balance: flop a byte of main memory; below one tenth or above 3,000 is a slip of units
    compute = {n: r.capacity for n, r in rates.items() if n.startswith("compute.")}
    for figure in compute.values():
        assert 0.01 < figure / memory < 3000
    assert max(compute.values()) / memory > 0.4
    # narrower formats never run slower than wider ones
    order = [p for p in ("fp64", "fp32", "fp16", "fp8") if f"compute.{p}" in compute]
    ladder = [compute[f"compute.{p}"] for p in order]
    assert ladder == sorted(ladder)
    if "compute.bf16" in compute and "compute.tf32" in compute:
        assert compute["compute.bf16"] >= compute["compute.tf32"] >= compute["compute.fp32"]
    # a device fills its memory in 0.1 ms (scratchpad) to a minute
    assert 1e-5 < machine.capacity("device") / memory < 60  # type: ignore[operator]


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_its_source(name: str) -> None:
    machine = load(name)
    assert len(machine.source) > 10
    for part in (*machine.resources.values(), *machine.links.values()):
        assert len(part.source) > 10, f"{name}: {part.name}"
    for calibration in machine.calibrations.values():
        assert calibration.source
        assert calibration.n > 0


SCALE = {"GHz": 1e9, "MHz": 1e6, "MT/s": 1e6, "TB/s": 1e12, "GB/s": 1e9}


def product_of(source: str) -> float:
    """What 'computed: 8 channels x 8 byte x 3,200 MT/s (why); more' multiplies out to."""
    plain = re.sub(r"\([^()]*\)", "", source.removeprefix("computed: "))
    product = 1.0
    for factor in re.split(r"; |, ", plain)[0].split(" x "):
        figure = re.match(r"\s*([\d.,]*\d)(?:/([\d,]+))?(-bit)?\s*(\S*)", factor)
        assert figure is not None, f"no figure in {factor!r} of {source!r}"
        product *= float(figure[1].replace(",", "")) * SCALE.get(figure[4].rstrip(","), 1.0)
        product /= float((figure[2] or "1").replace(",", "")) * (8 if figure[3] else 1)
    return product


def test_computed_sources_give_their_figure() -> None:
    """A source that starts 'computed: <figure>' is a product, and gives the capacity."""
    checked = 0
    for name, machine in catalogue().items():
        figures = {n: (r.capacity, r.source) for n, r in machine.resources.items()}
        figures |= {n: (k.bandwidth, k.source) for n, k in machine.links.items()}
        for what, (figure, source) in figures.items():
            if re.match(r"computed: \d", source):
                checked += 1
                assert product_of(source) == pytest.approx(figure, rel=0.005), f"{name} {what}"
    assert checked >= 45


@pytest.mark.parametrize(("name", "what", "figure"), ANCHORS)
def test_anchors(name: str, what: str, figure: float) -> None:
    assert load(name).resources[what].capacity == pytest.approx(figure, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "link", "one_way"),
    [("a100-80", "nvlink", 300e9), ("h100-sxm", "nvlink", 450e9), ("b200", "nvlink", 900e9)],
)
def test_links_are_one_direction(name: str, link: str, one_way: float) -> None:
    assert load(name).links[link].bandwidth == one_way


@pytest.mark.parametrize("name", ALL)
def test_toy_workload_is_bounded_everywhere(name: str) -> None:
    machine = load(name)
    precision, dtype = ("int8", "int8") if name == "gap8" else ("bf16", "bf16")
    answer = Case(toy(precision, dtype), machine).bound()
    assert answer.limit_seconds > 0
    assert answer.seconds >= answer.limit_seconds * (1 - 1e-12)
    assert answer.fits is True
    moved = answer.phases[0].bytes[machine.memory]
    assert answer.limit_seconds >= moved / machine.bandwidth("device") * (1 - 1e-9)


def test_a_missing_precision_is_said_not_guessed() -> None:
    with pytest.raises(NarrowsError, match="no unit for fp32"):
        Case(toy("fp32", "fp32"), load("gap8")).bound()


def test_round_trip_of_the_catalogue() -> None:
    for machine in catalogue().values():
        assert loads(dumps(machine), machine.name) == machine


def test_round_trip_of_every_part(tmp_path: Path) -> None:
    machine = example()
    assert loads(dumps(machine), "text") == machine
    save(machine, tmp_path / "mine.toml")
    assert load(tmp_path / "mine.toml") == machine
    assert load(str(tmp_path / "mine.toml")) == machine
    assert not list(tmp_path.glob(".*"))


def test_form_of_a_user_who_writes_least() -> None:
    text = """
    name = "least"
    kind = "cpu"
    [tiers]
    device = "dram"
    [rates.dram]
    capacity = 20e9
    unit = "byte/s"
    [rates."compute.fp32"]
    capacity = 100e9
    unit = "flop/s"
    """
    machine = loads(text, "least.toml")
    assert machine.bandwidth("device") == 20e9
    assert machine.capacity("device") is None
    assert machine.watts is None
    assert loads(text.encode("utf-8-sig"), "least.toml") == machine


def test_readme_form_is_valid() -> None:
    """The example users copy is a machine; the optional parts are too."""
    blocks = re.findall(r"```toml\n(.*?)```", (CATALOGUE / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 2
    machine = loads(blocks[0], "README.md")
    assert machine.name == "mine"
    extra = tomllib.loads(blocks[1])
    assert set(extra) == {"caches", "pricer", "channels", "calibrations"}
    tail = blocks[1][blocks[1].index("[channels") :]
    assert loads(blocks[0] + tail, "README.md").calibrations


def test_names() -> None:
    assert load("H100-SXM") is load("h100-sxm")
    with pytest.raises(NarrowsError, match="did you mean h100-sxm"):
        load("h100-smx")
    with pytest.raises(NarrowsError, match="narrows machines"):
        load("zzzzzz")
    with pytest.raises(NarrowsError, match="measured"):
        load("here")


def test_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", str(tmp_path / "none.toml"), tmp_path, "./none"):
        with pytest.raises(NarrowsError, match="no such machine file"):
            load(path)
    with pytest.raises(NarrowsError):
        load("bad\0name.toml")
    big = tmp_path / "big.toml"
    big.write_bytes(b"#\n" * 100_001)
    with pytest.raises(NarrowsError, match="larger than"):
        load(big)
    wrong = tmp_path / "wrong.toml"
    wrong.write_bytes(b"\xff\xfe")
    with pytest.raises(NarrowsError, match="UTF-8"):
        load(wrong)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    save(example(), path)
    assert load(path).units == 132
    save(example(units=7), path)
    assert load(path).units == 7


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, stop: type[BaseException] | OSError
) -> None:
    path = tmp_path / "mine.toml"
    save(example(), path)
    before = path.read_bytes()

    def fail(*_args: object) -> None:
        raise stop

    if step == "write":
        real = Path.open

        def opened(self: Path, *args: object, **kwargs: object) -> object:
            file = real(self, *args, **kwargs)  # type: ignore[arg-type]
            file.write("half of it")  # type: ignore[call-overload]
            file.close()
            raise stop

        monkeypatch.setattr(Path, "open", opened)
    else:
        monkeypatch.setattr(f"narrows.machines.load.os.{step}", fail)
    expected = NarrowsError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(example(units=7), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_save_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(NarrowsError, match=r"end in \.toml"):
        save(example(), tmp_path / "mine.json")
    with pytest.raises(NarrowsError, match="cannot be written"):
        save(example(), tmp_path / "no" / "folder" / "mine.toml")
    misfiled = {**example().resources, "other": Resource("hbm", Kind.RATE, 1e12, "byte/s")}
    for machine in (
        example(name="Not A Name"), example(kind="toaster"), example(resources=misfiled),
        example(title="\x1b[31mred"), example(units=-1), example(source="\ud800"),
        example(units="many"),
    ):  # fmt: skip
        with pytest.raises(NarrowsError):
            save(machine, tmp_path / "mine.toml")
    assert not list(tmp_path.iterdir())


def test_listing_is_fast_and_light() -> None:
    """All machines in well under 0.3 s after the import, with nothing heavy imported."""
    code = (
        "import time, sys; from narrows.machines.load import catalogue\n"
        "best = 9.0\n"
        "from narrows.machines import load as l\n"
        "for _ in range(5):\n"
        "    l._parsed.cache_clear(); t = time.process_time(); n = len(catalogue())\n"
        "    best = min(best, time.process_time() - t)\n"
        "heavy = {'torch', 'transformers', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "print(n, best, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, best, heavy = done.stdout.split(maxsplit=2)
    assert int(count) == len(ALL)
    assert float(best) < 0.15
    assert heavy.strip() == "[]"


def test_agrees_with_calculon_where_it_says_the_same() -> None:
    """A100 and H100 against calculon's system files: arithmetic, memory and links within 10 %."""
    data = os.environ.get("NARROWS_DATA")
    if not data:
        pytest.skip("NARROWS_DATA is not set: calculon's systems are not here")
    systems = json.loads((Path(data) / "training/calculon-systems.json").read_text("utf-8"))
    for theirs, ours in (("a100_80e", "a100-80"), ("h100_80g_nvl8", "h100-sxm")):
        system, machine = systems[theirs], load(ours)
        assert machine.resources["compute.fp16"].capacity == pytest.approx(
            system["matrix"]["float16"]["tflops"] * 1e12, rel=0.1
        )
        assert machine.bandwidth("device") == pytest.approx(system["mem1"]["GBps"] * 1e9, rel=0.1)
        assert machine.links["nvlink"].bandwidth == system["networks"][0]["bandwidth"] * 1e9
        assert machine.links["nvlink"].peers == system["networks"][0]["size"]
