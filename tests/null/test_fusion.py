"""Fusion keeps operations, never adds bytes, and never makes a cycle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows.core.fusion import LASTING, fuse
from narrows.core.plan import FUSIONS
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import FUSIBLE, Op, Phase, Use, Workload

FP32 = Codec.of("fp32")

# What is tested is the result, not how long a busy machine takes for it.
PATIENT = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def work(*ops: Op, **roles: str) -> Workload:
    """A workload over tensors of 10 elements, activations unless a role is given."""
    names = dict.fromkeys(u.tensor for op in ops for u in (*op.reads, *op.writes))
    tensors = [Tensor(n, roles.get(n, "activation"), {"token": 10.0}, FP32) for n in names]
    return Workload("toy", {t.name: t for t in tensors}, (Phase("forward", ops),))


def op(name: str, kind: str, reads: str, writes: str, **more: object) -> Op:
    """An op of 7 operations, its tensors named by letters."""
    return Op(name, kind, tuple(map(Use, reads.split())), tuple(map(Use, writes.split())),
              **{"flops": 7.0, **more})  # type: ignore[arg-type]  # fmt: skip


def names(workload: Workload) -> list[str]:
    return [o.name for o in workload.phases[0].ops]


def uses(found: Op) -> tuple[set[str], set[str]]:
    return {u.tensor for u in found.reads}, {u.tensor for u in found.writes}


def moved(workload: Workload) -> float:
    return sum(
        float(o.repeat * workload.tensors[u.tensor].bytes(u.at))
        for o in workload.phases[0].ops for u in (*o.reads, *o.writes)
    )  # fmt: skip


def test_a_chain_is_one_kernel():
    before = work(op("p", "pointwise", "a", "b"), op("q", "norm", "b w", "c"),
                  op("r", "copy", "c", "d"), w="weight")  # fmt: skip
    after = fuse(before, ("compiled",))
    assert len(after.phases[0].ops) == 1
    assert uses(after.phases[0].ops[0]) == ({"a", "w"}, {"d"})
    assert after.phases[0].ops[0].flops == 21
    assert after.phases[0].ops[0].kind == "norm"


def test_what_is_read_elsewhere_is_still_written():
    before = work(op("p", "pointwise", "a", "b"), op("q", "pointwise", "b", "c"),
                  op("m", "matmul", "b w", "d"))  # fmt: skip
    after = fuse(before, ("compiled",))
    assert names(after) == ["q", "m"]
    assert uses(after.phases[0].ops[0]) == ({"a"}, {"b", "c"})


def test_no_kernel_waits_for_itself():
    # p feeds a product whose output q joins with p's: one kernel of p and q would be a cycle
    before = work(op("p", "pointwise", "a", "b"), op("m", "matmul", "b w", "c"),
                  op("q", "pointwise", "b c", "d"))  # fmt: skip
    assert names(fuse(before, ("compiled",))) == ["p", "m", "q"]


def test_neighbours_that_share_no_data_stay_apart():
    before = work(op("p", "pointwise", "a", "b"), op("q", "pointwise", "a", "c"))
    assert names(fuse(before, ("compiled",))) == ["p", "q"]


def test_distance_in_the_list_does_not_matter():
    before = work(op("g", "pointwise", "a", "b"), op("m", "matmul", "x w", "y"),
                  op("h", "pointwise", "b x", "c"))  # fmt: skip
    assert names(fuse(before, ("compiled",))) == ["m", "h"]


def test_ops_that_run_more_often_stay_apart():
    before = work(op("p", "pointwise", "a", "b"), op("q", "pointwise", "b", "c", repeat=3))
    assert names(fuse(before, ("compiled",))) == ["p", "q"]
    many = np.array([2.0, 3.0])
    before = work(op("p", "pointwise", "a", "b", repeat=many),
                  op("q", "pointwise", "b", "c", repeat=many.copy()))  # fmt: skip
    assert names(fuse(before, ("compiled",))) == ["q"]


def test_a_backward_pass_is_compiled_apart():
    before = work(op("p", "pointwise", "a", "b"), op("q", "pointwise", "b", "c", group="backward"))
    assert names(fuse(before, ("compiled",))) == ["p", "q"]


@pytest.mark.parametrize("role", sorted(LASTING))
def test_lasting_tensors_are_never_gone(role: str):
    before = work(op("p", "pointwise", "a", "b"), op("q", "pointwise", "b", "c"), b=role)
    after = fuse(before, ("compiled",))
    assert uses(after.phases[0].ops[0]) == ({"a"}, {"b", "c"})


def test_in_place_kernels_read_what_they_change():
    before = work(op("p", "pointwise", "a b", "a"), op("q", "pointwise", "a", "c"))
    after = fuse(before, ("compiled",))
    assert uses(after.phases[0].ops[0]) == ({"a", "b"}, {"c"})


def test_pieces_of_a_tensor_are_told_apart():
    half = {"token": 5.0}
    first, second = Use("a", half, (0, 4, 10)), Use("a", half, (5, 9, 10))
    within = Use("a", {"token": 2.0}, (1, 2, 10))
    p = Op("p", "pointwise", (first, within), (Use("b"),))
    q = Op("q", "pointwise", (second, Use("b")), (Use("c"),))
    after = fuse(work(p, q), ("compiled",))
    assert after.phases[0].ops[0].reads == (first, second)


def attention(**scores: object) -> Workload:
    return work(
        op("scores", "matmul", "q k", "s", group="attention_prefill:0", precision="bf16",
           shape={"m": 10, "n": 10, "causal": 0.55, **scores}),
        op("mask", "pointwise", "s", "t", group="attention_prefill:0"),
        op("between", "pointwise", "x", "y"),
        op("softmax", "softmax", "t", "u", group="attention_prefill:0"),
        op("mixed", "matmul", "u v", "o", group="attention_prefill:0"),
    )  # fmt: skip


def test_flash_keeps_scores_on_chip_and_skips_masked_ones():
    after = fuse(attention(), ("flash",))
    assert names(after) == ["between", "attention_prefill"]
    found = after.phases[0].ops[1]
    assert uses(found) == ({"q", "k", "v"}, {"o"})
    assert (found.kind, found.precision) == ("attention_prefill", "bf16")
    assert found.flops == pytest.approx(0.55 * 28)
    assert fuse(after, ("flash", "compiled")) == after


def test_compiled_alone_fuses_the_softmax_with_the_mask():
    assert names(fuse(attention(), ("compiled",))) == ["scores", "between", "softmax", "mixed"]


def test_what_attention_saves_for_itself_is_made_again():
    back = [
        op("dv", "matmul", "u g", "dv", group="attention_prefill:0backward"),
        op("du", "matmul", "v g", "du", group="attention_prefill:0backward"),
    ]
    forward = attention()
    tensors = {**forward.tensors, **work(*back).tensors}
    tensors["u"] = Tensor("u", "saved", {"token": 10.0}, FP32)
    whole = Workload("toy", tensors, (Phase("f", (*forward.phases[0].ops, *back)),))
    after = fuse(whole, ("flash",))
    assert names(after) == ["between", "attention_prefill", "attention_prefill_backward"]
    assert "u" not in after.tensors
    assert uses(after.phases[0].ops[2]) == ({"g", "v"}, {"dv", "du"})


def test_rates_follow_their_tensor():
    p = Op("p", "pointwise", (Use("a"),), (Use("b"),), per_element={"a": 2.0})
    q = Op("q", "pointwise", (Use("b"), Use("a")), (Use("c"),), per_element={"b": 3.0, "a": 1.0})
    after = fuse(work(p, q), ("compiled",))
    found = after.phases[0].ops[0]
    assert found.per_element == {"a": 3.0}
    assert found.flops == 30.0
    assert after.flops("forward") == work(p, q).flops("forward")


@st.composite
def graphs(draw: st.DrawFn) -> Workload:
    """Any list of ops over a few tensors, read before or after they are written, or never."""
    letters = "abcdefgh"
    ops: list[Op] = []
    for i in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["matmul", "gather", *sorted(FUSIBLE)]))
        reads = draw(st.lists(st.sampled_from(letters), min_size=1, max_size=3, unique=True))
        writes = draw(st.lists(st.sampled_from(letters), min_size=1, max_size=2, unique=True))
        group = draw(st.sampled_from(["", "", "", "backward"]))
        repeat = draw(st.sampled_from([1.0, 1.0, 4.0]))
        rate = {reads[0]: 2.0} if draw(st.booleans()) else {}
        ops.append(op(str(i), kind, " ".join(reads), " ".join(writes), group=group,
                      repeat=repeat, per_element=rate))  # fmt: skip
    roles = {n: draw(st.sampled_from(["activation", "activation", "weight", "kv", "output"]))
             for n in letters}  # fmt: skip
    return work(*ops, **roles)


@given(graphs(), st.sampled_from([(), ("compiled",), ("flash",), FUSIONS]))
@PATIENT
def test_operations_are_kept_and_bytes_do_not_grow(before: Workload, fusion: tuple[str, ...]):
    after = fuse(before, fusion)
    assert after.flops("forward") == pytest.approx(before.flops("forward"))
    assert moved(after) <= moved(before) + 1e-9
    assert len(after.phases[0].ops) <= len(before.phases[0].ops)
    heavy = {o.name for o in before.phases[0].ops if o.kind not in FUSIBLE}
    assert heavy <= set(names(after))
    written = {u.tensor for o in before.phases[0].ops for u in o.writes}
    lasting = {n for n in written if before.tensors[n].role in LASTING}
    assert lasting <= {u.tensor for o in after.phases[0].ops for u in o.writes}
    assert fuse(after, fusion).flops("forward") == pytest.approx(after.flops("forward"))


@st.composite
def chains(draw: st.DrawFn) -> Workload:
    """A graph in which every op writes a tensor of its own and reads earlier ones."""
    ops: list[Op] = []
    for i in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["matmul", "pointwise", "norm", "copy"]))
        known = ["x", *(f"t{j}" for j in range(i))]
        reads = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        ops.append(op(str(i), kind, " ".join(reads), f"t{i}"))
    return work(*ops)


@given(chains())
@PATIENT
def test_kernels_can_run_in_the_order_given(before: Workload):
    after = fuse(before, ("compiled",))
    made = {"x"}
    for found in after.phases[0].ops:
        assert {u.tensor for u in found.reads} <= made, "reads what no earlier kernel made"
        made |= {u.tensor for u in found.writes}
    ends = {u.tensor for o in before.phases[0].ops for u in o.writes} - {
        u.tensor for o in before.phases[0].ops for u in o.reads}  # fmt: skip
    assert ends <= made
