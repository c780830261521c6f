"""Any module, traced: what torch would launch, without computing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from narrows.core.errors import NarrowsError
from narrows.core.fusion import fuse
from narrows.core.workload import Op, Workload
from narrows.trace.module import trace


class Block(nn.Module):
    """A residual block of a small convolutional network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def network(blocks: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), *[Block(16) for _ in range(blocks)], nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


IMAGES = torch.zeros(4, 3, 32, 32)

MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)),
            torch.zeros(3, 10)),
    "convolutions": (network, IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), torch.zeros(2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 4, groups=8, padding=3), torch.zeros(2, 8, 32)),
    "gru": (lambda: nn.GRU(16, 32, batch_first=True), torch.zeros(2, 9, 16)),
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True),
                  tuple(torch.zeros(2, 9, 64) for _ in range(3))),
}  # fmt: skip


def heavy(workload: Workload) -> float:
    """Operations of products and convolutions."""
    return sum(
        float(op.repeat * workload.op_flops(op))
        for op in workload.phases[0].ops if op.kind in ("matmul", "conv")
    )  # fmt: skip


def counted(module: nn.Module, inputs: object, training: bool) -> float:
    """What torch's own counter finds in a real run."""
    args = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    counter = FlopCounterMode(display=False)
    module.train(training)
    with counter:
        out = module(*args)  # type: ignore[misc]
        if training:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_operations_are_those_of_torch(name: str, training: bool):
    make, inputs = MODULES[name]
    module = make()
    found = Workload.of(module, inputs, training)
    assert heavy(found) == counted(module, inputs, training)
    assert [p.name for p in found.phases] == ["training step" if training else "forward"]


def test_weights_bytes_and_parameters():
    module = network()
    found = trace(module, IMAGES)
    count = sum(p.numel() for p in module.parameters())
    assert found.facts["parameters"] == count
    assert found.bytes("weight") == 4 * count
    read = {u.tensor for op in found.phases[0].ops for u in op.reads}
    assert {t.name for t in found.role("weight")} <= read


def test_nothing_is_computed_and_nothing_stays_changed():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trace(module, torch.full((3, 4), float("nan")), training=True)
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert not module[0]._forward_hooks
    assert not module[0]._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_network_too_large_for_any_machine():
    with torch.device("meta"):
        module = nn.Sequential(*[nn.Linear(1_000_000, 1_000_000) for _ in range(3)])
    found = trace(module, torch.zeros(8, 1_000_000, device="meta"))
    assert found.flops("forward") == 2 * 8 * 3e12


def test_views_are_free_and_read_what_they_show():
    def call(x: torch.Tensor) -> torch.Tensor:
        return x.view(4, 6).t().unsqueeze(0).expand(5, 6, 4)[:, :3] + 1.0

    found = trace(call, torch.zeros(24))
    (op,) = found.phases[0].ops
    assert op.kind == "pointwise"
    (use,) = op.reads
    assert found.tensors[use.tensor].elements(use.at) == 12
    assert found.tensors[op.writes[0].tensor].elements() == 60


def test_halves_of_a_tensor_are_two_pieces():
    found = trace(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], torch.zeros(8, 10))
    (op,) = found.phases[0].ops
    assert sum(found.tensors[u.tensor].bytes(u.at) for u in op.reads) == 8 * 10 * 4
    assert fuse(found, ("compiled",)).phases[0].ops[0].reads == op.reads


def test_in_place_and_partial_kernels():
    def call(x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        x[:, 2:4].copy_(x[:, :2])
        return table[rows] + x.add_(1)

    found = trace(call, (torch.zeros(3, 8), torch.zeros(100, 8), torch.zeros(3, dtype=torch.long)))
    sizes = [
        [float(found.tensors[u.tensor].elements(u.at)) for u in (*op.reads, *op.writes)]
        for op in found.phases[0].ops
    ]
    assert sizes == [[6, 6], [24, 3, 24], [24, 24], [24, 24, 24]] or sizes == [
        [6, 6], [24, 24], [24, 3, 24], [24, 24, 24]]  # fmt: skip


def test_precisions():
    module = nn.Linear(8, 8).to(torch.bfloat16)
    found = trace(nn.Sequential(module, nn.ReLU()), torch.zeros(2, 8, dtype=torch.bfloat16))
    assert [(o.kind, o.precision) for o in found.phases[0].ops] == [
        ("matmul", "bf16"), ("pointwise", "fp32")]  # fmt: skip
    assert found.facts["dtype"] == "bf16"
    assert found.bytes("weight") == 2 * 72


def folded(module: nn.Module, inputs: object, training: bool = False) -> tuple[Workload, Workload]:
    return (trace(module, inputs, training=training),
            trace(module, inputs, training=training, folded=False))  # fmt: skip


def moved(workload: Workload) -> float:
    return sum(
        float(op.repeat * workload.tensors[u.tensor].bytes(u.at))
        for op in workload.phases[0].ops for u in (*op.reads, *op.writes)
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_folding_keeps_operations_bytes_and_what_is_stored(training: bool):
    short, full = folded(network(6), IMAGES, training)
    name = short.phases[0].name
    assert len(short.phases[0].ops) < 0.6 * len(full.phases[0].ops)
    assert sum(o.repeat for o in short.phases[0].ops) == len(full.phases[0].ops)
    assert short.flops(name) == full.flops(name)
    assert moved(short) == pytest.approx(moved(full), rel=1e-12)
    for role in ("weight", "gradient", "state", "saved", "input", "output"):
        assert short.bytes(role) == full.bytes(role), role


def test_folded_weights_have_a_layer_axis():
    short, _ = folded(network(6), IMAGES)
    weight = short.tensors["*.first.weight"]
    assert weight.axes == {"layer": 6, "out": 16, "in": 16, "height": 3, "width": 3}
    (op,) = [o for o in short.phases[0].ops if o.name.endswith("first.convolution")]
    assert op.repeat == 6
    use = next(u for u in op.reads if u.tensor == weight.name)
    assert weight.elements(use.at) == 16 * 16 * 9


class Skips(nn.Module):
    """Each layer's output is needed again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [x]
        for layer in self.layers:
            kept.append(torch.relu(layer(kept[-1])))
        return torch.stack(kept[1:]).sum(0)


def test_skips_live_side_by_side():
    short, full = folded(Skips(), torch.zeros(2, 8))
    skips = [t for t in short.tensors.values() if t.role == "activation" and "layer" in t.axes]
    # the first layer reads the input of the network and is a block of its own
    assert [t.axes["layer"] for t in skips] == [5]
    assert short.flops("forward") == full.flops("forward")


def test_queries_and_keys_of_one_layer_are_not_two_layers():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.q_proj(x)) + torch.tanh(self.k_proj(x))

    found = trace(Twice(), torch.zeros(2, 8))
    assert [o.repeat for o in found.phases[0].ops] == [1] * 5


def attention(workload: Workload) -> list[Op]:
    return [op for op in workload.phases[0].ops if op.kind.startswith("attention")]


def test_attention_is_one_kernel():
    q, k = torch.zeros(2, 8, 30, 64), torch.zeros(2, 2, 30, 64)
    call = nn.functional.scaled_dot_product_attention
    found = trace(lambda q, k, v: call(q, k, v, is_causal=True, enable_gqa=True), (q, k, k))
    (op,) = attention(found)
    seen = 2 * 8 * 30 * 31 / 2
    assert op.flops == seen * (4 * 64 + 7)
    assert (op.shape["q"], op.shape["kv_heads"]) == (30, 2)
    moved = sum(float(found.tensors[u.tensor].bytes(u.at)) for u in (*op.reads, *op.writes))
    assert moved == 4 * (2 * q.numel() + 2 * k.numel())
    one = trace(lambda q, k, v: call(q, k, v), (q[:, :, :1], k[:, :1].expand(2, 8, 30, 64), q))
    assert [o.kind for o in attention(one)] == ["attention_decode"]


def test_attention_written_out_is_recognised():
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (q @ k.transpose(-1, -2) / 8 + torch.ones(30, 30)).softmax(-1)
        return weights @ v

    q = torch.zeros(2, 8, 30, 64)
    found = fuse(trace(call, (q, q.clone(), q.clone())), ("flash",))
    (op,) = attention(found)
    assert op.flops == 2 * 8 * 30 * 30 * (4 * 64 + 7)
    assert len(op.writes) == 1


def test_saved_activations_are_what_torch_saves():
    module = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(),
        nn.Softmax(-1),
    )  # fmt: skip
    x = torch.zeros(4, 16)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    for tensor in (x, *module.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert trace(module, x, training=True).bytes("saved") == sum(kept.values())


def test_a_training_step_has_all_its_parts():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    found = trace(module, torch.zeros(4, 8), training=True)
    count = sum(p.numel() for p in module.parameters())
    assert found.bytes("gradient") == 4 * count
    assert found.bytes("state") == 8 * count
    kinds = [op.kind for op in found.phases[0].ops]
    assert kinds.count("optimizer") == 4
    names = {t.name for t in found.role("gradient")}
    assert names == {f"{n}.grad" for n, _ in module.named_parameters()}
    half = trace(module.to(torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16), training=True)
    assert half.bytes("state") == 12 * count


def test_losses_in_outputs_are_found():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.layer(x), "loss": self.layer(x).sum()}

    found = trace(Model(), {"x": torch.zeros(2, 4)}, training=True)
    assert heavy(found) > 0


@pytest.mark.parametrize(
    ("target", "inputs", "says"),
    [
        (nn.Linear(3, 4), torch.zeros(5, 5), "same reduction dim"),
        (lambda x: x * x.sum().item(), torch.zeros(3), "values of tensors"),
        (lambda x: x[x > 0], torch.zeros(3), "values of tensors"),
        (3, torch.zeros(3), "can be traced"),
    ],
)
def test_what_cannot_be_traced_says_so(target: object, inputs: object, says: str):
    with pytest.raises(NarrowsError, match=says):
        trace(target, inputs)  # type: ignore[arg-type]


def test_nothing_to_train_is_refused():
    with pytest.raises(NarrowsError, match="trainable"):
        trace(nn.ReLU(), torch.zeros(3), training=True)


def test_code_may_look_at_constants_it_made():
    def call(x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[0], device=x.device)
        return x * 2 if bool((steps.diff() == 1).all()) else x

    assert trace(call, torch.zeros(4)).phases[0].ops[-1].name == "mul"
