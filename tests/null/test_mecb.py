"""MEC-B on cases and on models, with torch not installed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.flow import Flow
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.information._base import entropy
from narrows.information.mecb import MECB

from . import toys

LAW = tuple(np.random.default_rng(0).dirichlet(np.ones(64)).tolist())


def case(need: float = 2.0, law: tuple[float, ...] = LAW) -> Case:
    """64 symbols as int8 are sent to a peer, 100 of them."""
    sent = Tensor("symbols", "activation", {"token": 100}, Codec.of("int8"))
    op = Op("send", "send_recv", (Use("symbols"),), shape={"peers": 2})
    flow = Flow("message", need, ("symbols",), law=law)
    work = Workload("sensor", {"symbols": sent}, (Phase("send", (op,)),), flows=(flow,))
    return Case(work, toys.machine())


def test_a_case_without_a_law_is_the_same_case():
    plain = Case(toys.product(), toys.machine())
    assert MECB().predict(plain) is plain
    assert "nothing to code" in MECB().why(plain)
    no_law = case(law=())
    assert MECB().predict(no_law) is no_law


def test_the_link_carries_the_code_and_the_channel_its_information():
    before = case()
    after = before.with_(MECB())
    h = float(entropy(np.array(LAW)))
    bits = after.workload.tensors["symbols"].codec.bits
    assert h / 2 - 0.5 < bits <= h / 2
    a, b = bound(before).phase("send"), bound(after).phase("send")
    assert b.bytes["wire"] / a.bytes["wire"] == pytest.approx(bits / 8)
    assert b.seconds < a.seconds
    (row,) = bound(after).channels
    assert row.have == pytest.approx(bits)
    assert row.fits == (bits >= 2.0)
    assert after.workload.tensors["mecb.message"].bytes() > 0
    assert [op.name for op in after.workload.phases[0].ops] == ["mecb.message", "send"]


def test_what_is_lost_shows_as_a_need_that_does_not_fit():
    given = case(need=4.0)
    assert bound(given).channels[0].fits
    assert not bound(given.with_(MECB())).channels[0].fits
    assert "4 are needed" in MECB().why(given)


def test_twice_is_once_and_a_tighter_one_wins():
    once = case().with_(MECB())
    assert MECB().predict(once) is once
    tight = once.with_(MECB(compression=4))
    alone = case().with_(MECB(compression=4))
    assert tight.workload.tensors["symbols"].codec == alone.workload.tensors["symbols"].codec
    assert len(tight.workload.phases[0].ops) == 2
    assert bound(tight).channels[0].have == bound(alone).channels[0].have


def test_a_split_symbol_passes_less_than_it_stores():
    after = case(law=(0.7, 0.2, 0.1)).with_(MECB(compression=1.3, refine=True))
    (row,) = bound(after).channels
    assert row.resource == "mecb"
    assert row.have < after.workload.tensors["symbols"].codec.bits


def test_lossless_is_the_entropy():
    after = case().with_(MECB(compression=1))
    assert after.workload.tensors["symbols"].codec.bits == pytest.approx(entropy(np.array(LAW)))


def test_variants():
    assert [v.compression for v in MECB.variants(case())] == [2.0, 4.0]
    assert [v.compression for v in MECB.variants(case(law=()))] == [2.0]


def law_of(observation: int) -> np.ndarray:
    return np.random.default_rng(observation).dirichlet(np.ones(5))


def test_a_message_arrives_and_the_model_keeps_its_law():
    prior = np.full(16, 1 / 16)
    with (
        MECB(compression=1).apply(law_of, prior) as there,
        MECB(compression=1).apply(law_of, prior) as here,
    ):
        rng = np.random.default_rng(0)
        for message in (3, 11):
            there.model.reset()
            here.model.reset()
            for step in range(30):
                assert there.model(step) == pytest.approx(law_of(step))
                assert there.model.table(step).sum(0) == pytest.approx(law_of(step))
                here.model.receive(step, there.model.send(message, step, rng))
                assert here.model.belief == pytest.approx(there.model.belief)
            assert here.model.belief.argmax() == message
            assert here.model.belief.max() > 0.99


def test_a_receiver_with_another_model_is_told():
    with MECB().apply(lambda o: np.array([1.0, 0.0]), np.array([0.5, 0.5])) as applied:
        with pytest.raises(NarrowsError, match="cannot follow"):
            applied.model.receive(0, 1)
        with pytest.raises(NarrowsError, match="message"):
            applied.model.send(2, 0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("wrong", "match"), [({"compression": 0.5}, "at least 1"), ({"seek": "most"}, "way to seek")]
)
def test_what_is_no_setting_is_refused(wrong, match):
    with pytest.raises(NarrowsError, match=match):
        MECB(**wrong)
    with pytest.raises(NarrowsError, match="callable"):
        MECB().apply(np.zeros(3))


def test_other_flows_are_left_alone():
    given = case()
    other = Flow("other", 1.0, ("symbols",))
    work = replace(given.workload, flows=(*given.workload.flows, other))
    after = replace(given, workload=work).with_(MECB())
    assert after.workload.flows[1] is other
