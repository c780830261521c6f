"""The information plane of torch modules: hooks, recorder, training; a courier over logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrows.core.errors import NarrowsError
from narrows.information.information_plane import InformationPlane
from narrows.information.mecb import MECB
from narrows.information.networks_torch import Networks, log_spaced, train
from narrows.information.probe_torch import Recorder, activations
from narrows.information.source import sphere_rule


@pytest.fixture(scope="module")
def source():
    return sphere_rule()


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3),
        torch.nn.Tanh(), torch.nn.Linear(3, 2),
    )  # fmt: skip


def test_hooks_read_what_ran_and_leave_no_trace(source):
    model = net().train()
    found = activations(model, source.x)
    assert {k: v.shape for k, v in found.items()} == {"1": (4096, 5), "4": (4096, 3)}
    x = torch.as_tensor(source.x, dtype=torch.float32)
    with torch.no_grad():
        assert found["1"] == pytest.approx(torch.tanh(model[0](x)).double().numpy())
    assert model.training
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_module_and_its_activations_read_alike(source):
    model = net()
    instrument = InformationPlane()
    a = instrument.measure((model, source))
    b = instrument.measure((activations(model, source.x), source))
    assert a == b
    assert a.value <= a.ceiling
    assert a.facts["layer"] == "4"


def test_layers_are_named_or_refused(source):
    plane = InformationPlane().plane(net(), source, layers=("0",))
    assert [one.name for one in plane.layers] == ["0"]
    with pytest.raises(NarrowsError, match="layer of the model"):
        InformationPlane().plane(net(), source, layers=("9",))


def test_a_recorder_reads_at_log_spaced_steps_and_lets_go(source):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.as_tensor(source.x, dtype=torch.float32)
    y = torch.as_tensor(source.y)
    with Recorder(InformationPlane(), model, source, each=1).attach(optimizer) as seen:
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert sorted(seen.planes) == [0, 1, 2, 4, 8, 16, 20]
    optimizer.step()
    assert seen.step == 20


def test_a_seed_trains_alike_in_any_company(source):
    rulers = {"fixed": InformationPlane()}
    alone = train(source, rulers, (12, 4, 2), seeds=(7,), epochs=4, at=(0, 4))
    among = train(source, rulers, (12, 4, 2), seeds=(3, 7), epochs=4, at=(0, 4))
    assert among.x["fixed"][:, 1] == pytest.approx(alone.x["fixed"][:, 0], abs=0.02)
    assert among.test_error[:, 1] == pytest.approx(alone.test_error[:, 0], abs=0.01)
    assert alone.drift.shape == (2, 1, 2)


def test_gradients_of_networks_side_by_side_are_their_own(source):
    nets = Networks((12, 4, 2), "tanh", (0, 1))
    x = torch.as_tensor(source.x[:64], dtype=torch.float32)
    y = torch.as_tensor(source.y[:64])
    logits = nets.layers(x.expand(2, *x.shape))[-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(2), reduction="sum")
    (loss / 64).backward()
    first = torch.nn.functional.cross_entropy(
        torch.tanh(x @ nets.weights[0][1] + nets.biases[0][1]) @ nets.weights[1][1]
        + nets.biases[1][1],
        y,
    )
    wanted = torch.autograd.grad(first, nets.weights[0])[0][1]
    assert nets.weights[0].grad is not None
    assert torch.allclose(nets.weights[0].grad[1], wanted, atol=1e-6)


def test_training_learns_and_the_output_comes_to_know_the_label(source):
    h = train(
        source, {"fixed": InformationPlane()}, (12, 10, 7, 2), seeds=(0, 1), epochs=40, at=(0, 40)
    )
    assert (h.train_error[-1] < h.train_error[0] - 0.15).all()
    assert (h.y["fixed"][-1, :, -1] > h.y["fixed"][0, :, -1] + 0.1).all()
    assert (h.y["fixed"] <= 1.0).all()
    assert (h.x["fixed"] <= 12.0).all()


def test_epochs_are_log_spaced():
    assert log_spaced(10, each=1) == (0, 1, 2, 4, 8, 10)
    assert log_spaced(1) == (0, 1)


def test_a_courier_over_logits_of_a_module():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    observation = torch.tensor([[0.1, -0.2, 0.3]])
    with MECB(compression=1).apply(model, np.full(6, 1 / 6)) as applied:
        wanted = torch.softmax(model(observation), -1)[0].detach().numpy()
        assert applied.model(observation) == pytest.approx(wanted, abs=1e-6)
        applied.model.send(2, observation, np.random.default_rng(0))
        assert applied.model.belief.sum() == pytest.approx(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
