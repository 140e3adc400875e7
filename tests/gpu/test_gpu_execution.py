"""How the kernels are launched: graphs, streams, devices, repeatability, memory, sizes, and no wait for the device."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_device import ON_CARD, captured, no_host_synchronisation, only_on_card
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

T, B, I, H = 7, 6, 5, 19  # noqa: E741
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {"bidirectional": True, "num_layers": 2}),
    "LSTM, projection": ("LSTM", {"proj_size": 4}),
    "GRU": ("GRU", {"bidirectional": True, "batch_first": True}),
    "RNN": ("RNN", {"num_layers": 2, "bias": False}),
    "LSTM, norms": ("LSTM", {"bidirectional": True, "layer_norm": "separate", "cell_norm": "output", "peephole": True}),
    "GRU, reset before": ("GRU", {"batch_first": True, "reset_after": False, "gate_activation": "hard_sigmoid"}),
}
LAYOUTS = ["dense", "hx", "lengths, resets", "packed"]
over_cases = pytest.mark.parametrize("case", CASES)
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Layer:
    """A module, data for it that can be replaced in place, and what a training step computes."""

    def __init__(self, case: str, layout: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        kind, options = CASES[case]
        self.module = getattr(rnnfast, kind)(I, H, dtype=dtype, device=device, **options)
        self.layout, self.time = layout, 1 if options.get("batch_first") else 0
        shape = (B, T) if self.time else (T, B)
        data = torch.randn(*shape, I, dtype=dtype)
        self.wrap: Callable[[Tensor], Any] = lambda data: data
        self.options: dict[str, Tensor] = {}
        self.state: list[Tensor] = []
        if layout == "packed":
            lengths = torch.tensor([T, 1, 3, T, 2, 5])
            packed = pack_padded_sequence(data, lengths, bool(self.time), enforce_sorted=False).to(device)
            data, rest = packed.data, packed[1:]
            self.wrap = lambda data: PackedSequence(data, *rest)
        if layout == "lengths, resets":
            lengths = torch.tensor([T, 0, 3, T, 1, 5], device=device)
            self.options = {"lengths": lengths, "resets": (torch.rand(shape) < 0.3).to(device)}
        if layout == "hx":
            count = self.module.num_layers * (2 if self.module.bidirectional else 1)
            sizes = [self.module.proj_size or H] + ([H] if kind == "LSTM" else [])
            self.state = [torch.randn(count, B, size, dtype=dtype).to(device).requires_grad_() for size in sizes]
        self.data = data.to(device).requires_grad_()

    def step(self) -> list[Tensor]:
        """Results and every gradient."""
        hx = None if not self.state else tuple(self.state) if len(self.state) == 2 else self.state[0]
        output, states = self.module(self.wrap(self.data), hx, **self.options)
        output = output.data if isinstance(output, PackedSequence) else output
        results = [output, *(states if isinstance(states, tuple) else [states])]
        value = sum(result.sin().sum() for result in results)
        inputs = [self.data, *self.state, *self.module.parameters()]
        return [result.detach() for result in results] + list(torch.autograd.grad(value, inputs))

    def inference(self) -> list[Tensor]:
        with torch.no_grad():
            output, states = self.module(self.wrap(self.data), **self.options)
        output = output.data if isinstance(output, PackedSequence) else output
        return [output, *(states if isinstance(states, tuple) else [states])]

    def renew(self) -> None:
        """Other numbers at the same addresses."""
        with torch.no_grad():
            for tensor in [self.data, *self.state, *self.module.parameters()]:
                tensor.copy_(torch.randn(tensor.shape) / 3)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (value, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(value, other), f"result {index} differs by {(value - other).abs().max()}"


@over_layouts
@over_cases
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_graph_of_forward_and_backward(device: str, case: str, layout: str, training: bool) -> None:
    """Replayed with new data and new weights; nothing but the addresses may be remembered."""
    layer = Layer(case, layout, device)
    run = layer.step if training else layer.inference
    replay, results = captured(run)
    for _ in range(3):
        layer.renew()
        replay()
        assert_same(list(results), run())


@only_on_card
def test_graphed_callables() -> None:
    """PyTorch's own way to train with graphs."""
    module = rnnfast.LSTM(I, H, num_layers=2, device="cuda")
    plain = rnnfast.LSTM(I, H, num_layers=2, device="cuda")
    plain.load_state_dict(module.state_dict())
    graphed = torch.cuda.make_graphed_callables(module, (torch.randn(T, B, I, device="cuda", requires_grad=True),))
    for _ in range(3):
        input = torch.randn(T, B, I, device="cuda")
        # Not added up in `.grad`: PyTorch puts the graph's own buffers there, which the next replay writes over
        # (pytorch/pytorch issue 181723).
        found, expected = (
            torch.autograd.grad(run(input)[0].square().sum(), list(own.parameters()))
            for run, own in ((graphed, module), (plain, plain))
        )
        assert_same(list(found), list(expected))


@over_layouts
@over_cases
def test_the_host_never_waits(device: str, case: str, layout: str) -> None:
    layer = Layer(case, layout, device)
    # what is loaded or allocated only once
    layer.step()
    with no_host_synchronisation():
        layer.step()
        layer.inference()


@only_on_card
@over_layouts
@over_cases
def test_side_stream(device: str, case: str, layout: str) -> None:
    """Behind a long wait on that stream: a kernel on any other one would see the old data."""
    layer = Layer(case, layout, device)
    layer.step()
    new = torch.randn_like(layer.data)
    old = layer.data.detach().clone()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            layer.data.copy_(new)
        found = layer.step()
    torch.cuda.current_stream().wait_stream(side)
    expected = layer.step()
    assert_same(found, expected)
    with torch.no_grad():
        layer.data.copy_(old)
    assert not torch.equal(layer.step()[0], expected[0])


@only_on_card
def test_two_streams_at_once(device: str) -> None:
    """Two recurrences side by side share nothing."""
    layers = [Layer("LSTM", layout, device) for layout in ("dense", "packed")]
    expected = [layer.step() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []
    for _ in range(5):
        found = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer.step())
        torch.cuda.synchronize()
        for own, other in zip(found, expected, strict=True):
            assert_same(own, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@over_layouts
@over_cases
def test_second_device(case: str, layout: str) -> None:
    """The current device is the first; the tensors decide."""
    torch.manual_seed(5)
    first = Layer(case, layout, "cuda:0").step()
    torch.manual_seed(5)
    layer = Layer(case, layout, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = layer.step()
    assert all(value.device.index == 1 for value in found)
    for value, other in zip(found, first, strict=True):
        assert torch.allclose(value.to("cuda:0"), other, atol=1e-5)
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="device"):
        layer.module(torch.randn(T, B, I, device="cuda:0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@over_layouts
@over_cases
def test_twenty_runs_agree_bit_for_bit(device: str, case: str, layout: str, dtype: torch.dtype) -> None:
    layer = Layer(case, layout, device, dtype)
    first = layer.step()
    for _ in range(19):
        assert_same(layer.step(), first)


def test_twenty_runs_of_a_large_batch(device: str) -> None:
    """Many blocks: an order of arrival that counted would show here."""
    sizes = (20, 300, 64, 320) if ON_CARD else (3, 30, 8, 40)
    module = rnnfast.LSTM(sizes[2], sizes[3], bidirectional=True, device=device)
    input = torch.randn(sizes[0], sizes[1], sizes[2], device=device)

    def run() -> list[Tensor]:
        output = module(input)[0]
        return [output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))]

    first = run()
    for _ in range(19):
        assert_same(run(), first)


@only_on_card
@pytest.mark.alone
def test_out_of_memory_leaves_a_usable_process(backend: str, device: str) -> None:
    """And is the error that torch.nn raises, with the size that was asked for."""
    size = r"needs \d+ bytes \([\d.]+ GiB\) on cuda:0 \([\d.]+ [GM]iB free of [\d.]+ GiB\)"
    text = size if backend == "cuda" else "out of memory.*GiB"
    layer = Layer("LSTM", "lengths, resets", device)
    expected = layer.step()
    module = rnnfast.LSTM(1, 1024, device=device)
    free, total = torch.cuda.mem_get_info()
    # an input that takes almost nothing, and results that do not fit
    input = torch.zeros(1, 1, 1, device=device, requires_grad=True)
    rows = int(2 * total / (4 * 1024 * 4)) // 64 + 1
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError, match=text):
            module(input.expand(rows, 64, 1))[0].sum().backward()
        gc.collect()
        assert_same(layer.step(), expected)
    # in the backward pass, too
    torch.cuda.empty_cache()
    output = module(input.expand(int(free / 8 / (4 * 1024 * 4)) // 64, 64, 1))[0]
    # the forward pass's gates, which PyTorch keeps, are as large as what the backward pass asks for
    torch.cuda.empty_cache()
    filler = torch.empty(int(0.95 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device=device)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=text):
        output.sum().backward()
    del filler, output
    gc.collect()
    torch.cuda.empty_cache()
    assert_same(layer.step(), expected)


@only_on_card
def test_memory_is_what_the_results_need(device: str) -> None:
    module = rnnfast.LSTM(128, 256, device=device)
    input = torch.randn(200, 64, 128, device=device)
    rows = 200 * 64

    def peak(run: Callable[[], Any]) -> int:
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def inference() -> None:
        with torch.no_grad():
            module(input)

    # gates and output, and some workspace
    assert peak(inference) < 1.3 * 4 * rows * (4 * 256 + 256) + 2**22
    # at most two tensors of the size of the gates at a time, reserve, output, cells, gradients, temporaries of autograd
    assert peak(lambda: module(input)[0].sum().backward()) < 1.3 * 4 * rows * (3 * 4 * 256 + 5 * 256 + 2 * 128) + 2**24
    module.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        inference()
        module(input)[0].sum().backward()
        module.zero_grad()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_more_than_two_to_the_31_elements(device: str, kind: str) -> None:
    """The last rows of a huge batch, against the same rows alone: results and gradients."""
    steps, batch, hidden = (4700, 128, 1024) if ON_CARD else (20, 8, 16)
    if ON_CARD:
        needed = 14 * steps * batch * 4 * hidden
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
        assert steps * batch * (4 if kind == "LSTM" else 3) * hidden > (2**31 if kind == "LSTM" else 2**30)
    module = getattr(rnnfast, kind)(2, hidden, dtype=torch.float16, device=device)
    with torch.no_grad():
        # a short memory, so that roundings do not add up over thousands of steps
        module.weight_hh_l0.mul_(0.2)
    data = torch.randn(steps, batch, 2, dtype=torch.float32).to(device, torch.float16)
    found = []
    for part in (data, data[:, -8:].contiguous()):
        part = part.requires_grad_()
        output = module(part)[0]
        (grad,) = torch.autograd.grad(output[:, -8:].float().sin().sum(), [part])
        found.append((output[:, -8:].detach().clone(), grad[:, -8:].clone()))
        del output, grad
    for value, other in zip(*found, strict=True):
        assert torch.allclose(value.float(), other.float(), atol=0.01, rtol=0.01)


@only_on_card
def test_lengths_out_of_range_count_as_the_ends(device: str) -> None:
    """Their values cannot be looked at without halting the device."""
    module = rnnfast.LSTM(I, H, bidirectional=True, device=device)
    input = torch.randn(T, B, I, device=device)
    wrong = torch.tensor([-3, T + 4, 2, 2**40, -(2**40), T], device=device)
    found, expected = module(input, lengths=wrong), module(input, lengths=wrong.clamp(0, T))
    assert_same([found[0], *found[1]], [expected[0], *expected[1]])
