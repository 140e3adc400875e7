"""What must not go wrong: threads, forks, odd shapes, odd values, long sequences, second backward passes, tracing."""

import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

import rnnfast
from rnnfast import _dynamo_hook

KINDS = ["LSTM", "GRU", "RNN"]


def pair(kind, *args, **kwargs):
    """torch.nn's module and ours, with the same parameters."""
    theirs, ours = getattr(nn, kind)(*args, **kwargs), getattr(rnnfast, kind)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves(result):
    return [result] if isinstance(result, torch.Tensor) else [tensor for item in result for tensor in leaves(item)]


def run(layer, input, hx=None, **kwargs):
    """Outputs, states and every gradient of a loss that weighs them all differently."""
    input = input.detach().requires_grad_()
    results = leaves(layer(input, hx, **kwargs))
    loss = sum(((i + 1) * result.square()).sum() for i, result in enumerate(results))
    return [*(result.detach() for result in results), *torch.autograd.grad(loss, [input, *layer.parameters()])]


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, **tolerance)


# --- threads and processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_share_a_module(kind):
    layer = getattr(rnnfast, kind)(16, 24, 2, bidirectional=True, dtype=torch.float64)
    inputs = [torch.randn(20 + i, 1 + i % 4, 16, dtype=torch.float64) for i in range(8)]
    expected = [run(layer, input) for input in inputs]
    results, failures, start = [None] * 8, [], threading.Barrier(8)

    def work(i):
        try:
            start.wait()
            for _ in range(3):
                results[i] = run(layer, inputs[i])
                with torch.no_grad():
                    assert_close(layer(inputs[i])[0], expected[i][0])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for result, wanted in zip(results, expected, strict=True):
        same(result, wanted)


class Encoded(Dataset):
    """Runs a layer inside the loader's worker process."""

    def __init__(self, layer, inputs):
        self.layer, self.inputs = layer, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.inputs[i])[0]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use():
    layer = rnnfast.GRU(16, 24, 2)
    inputs = torch.randn(6, 30, 8, 16)
    expected = [run(layer, input)[0] for input in inputs]
    loader = DataLoader(Encoded(layer, inputs), num_workers=2, multiprocessing_context="fork", timeout=120)
    for output, wanted in zip(loader, expected, strict=True):
        assert_close(output[0], wanted)
    assert_close(run(layer, inputs[0])[0], expected[0])  # the parent still works


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_keeps_its_thread_count_does_not_hang():
    """The pool's threads are not there in the child: a region that waited for them would never end."""
    layer = rnnfast.GRU(64, 128)
    input = torch.randn(20, 16, 64)
    with torch.no_grad():
        wanted = layer(input)[0].numpy().tobytes()  # large enough to start the pool
        child = os.fork()
        if child == 0:
            # Compared without torch, whose own parallel operations do hang here.
            os._exit(0 if layer(input)[0].numpy().tobytes() == wanted else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hung")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0


# --- shapes, layouts and values -------------------------------------------------------------------------------------

SHAPES = {
    "one step": (1, 3, 4, 5),
    "one row": (6, 1, 4, 5),
    "one unit": (6, 3, 4, 1),
    "all one": (1, 1, 1, 1),
    "odd": (7, 5, 3, 13),
    "wide": (3, 2, 33, 67),
    "no rows": (6, 0, 4, 5),
    "many rows": (3, 130, 4, 17),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_shapes(kind, shape, bidirectional):
    steps, batch, features, hidden = SHAPES[shape]
    theirs, ours = pair(kind, features, hidden, bidirectional=bidirectional, dtype=torch.float64)
    input = torch.randn(steps, batch, features, dtype=torch.float64)
    same(run(ours, input), run(theirs, input))
    with torch.no_grad():
        same(leaves(ours(input)), leaves(theirs(input)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_strided_and_expanded_tensors(kind, batch_first):
    theirs, ours = pair(kind, 4, 6, 2, batch_first=batch_first, dtype=torch.float64)
    wide = torch.randn(6, 3, 9, dtype=torch.float64)
    inputs = [
        wide[..., 1::2],
        torch.randn(3, 6, 4, dtype=torch.float64).transpose(0, 1),
        torch.randn(4, 3, 6, dtype=torch.float64).permute(2, 1, 0),
        torch.randn(6, 1, 4, dtype=torch.float64).expand(6, 3, 4),
        torch.randn(1, 3, 4, dtype=torch.float64).expand(6, 3, 4),
        wide.flip(0)[..., :4],
    ]
    batch = 6 if batch_first else 3
    states = [torch.randn(1, 1, 6, dtype=torch.float64).expand(2, batch, 6) for _ in range(2)]
    strided = [torch.randn(6, batch, 2, dtype=torch.float64).permute(2, 1, 0) for _ in range(2)]
    for input in inputs:
        for hx in (states, strided):
            given = tuple(hx) if kind == "LSTM" else hx[0]
            same(run(ours, input, given), run(theirs, input, given))
            with torch.no_grad():
                same(leaves(ours(input, given)), leaves(theirs(input, given)))
    for layer in (theirs, ours):  # weights with strides, as weight tying by transposition gives
        layer.weight_hh_l0 = nn.Parameter(theirs.weight_hh_l0.detach().t().contiguous().t())
        layer.weight_ih_l0 = nn.Parameter(theirs.weight_ih_l0.detach().repeat_interleave(2, 1)[:, ::2])
    same(run(ours, inputs[0]), run(theirs, inputs[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_odd_values_pass_as_in_torch(kind, value):
    theirs, ours = pair(kind, 4, 5, bidirectional=True, dtype=torch.float64)
    clean = torch.randn(6, 3, 4, dtype=torch.float64)
    spoiled = clean.clone()
    spoiled[2, 1, 0] = value
    hx = torch.randn(2, 3, 5, dtype=torch.float64)
    bad_hx = hx.clone()
    bad_hx[0, 2, 3] = value
    for input, h in ((spoiled, hx), (clean, bad_hx)):
        given = (h, hx) if kind == "LSTM" else h
        with torch.no_grad():
            got, expected = leaves(ours(input, given)), leaves(theirs(input, given))
        same(got, expected, equal_nan=True)
        same(run(ours, input, given), run(theirs, input, given), equal_nan=True)
    if value != value:
        assert ours(spoiled)[0][2:, 1].isnan().any()
    rows = [0, 2]  # what is in one row stays in it
    assert_close(ours(spoiled)[0][:, rows], ours(clean)[0][:, rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_every_type(kind, dtype):
    """Padding that holds NaN beyond a row's length stays out of everything."""
    layer = getattr(rnnfast, kind)(4, 5, bidirectional=True, dtype=dtype)
    input = torch.randn(6, 3, 4).to(dtype)
    padded = input.clone()
    padded[4:, 0] = padded[:, 2] = float("nan")
    lengths = torch.tensor([4, 6, 0])
    same(run(layer, padded, lengths=lengths)[0:1], run(layer, input, lengths=lengths)[0:1], rtol=0, atol=0)
    gradients = run(layer, padded, lengths=lengths)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert layer(padded)[0][:, 2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_seventy_thousand_steps(kind):
    """Beyond 65535, where torch.nn's CUDA kernels end: one call against pieces that carry the state."""
    theirs, ours = pair(kind, 2, 3, dtype=torch.float64)
    input = torch.randn(70_000, 1, 2, dtype=torch.float64)

    class Pieces(nn.Module):
        def forward(self, input, hx):
            outputs = []
            for piece in input.split(17_500):
                output, hx = ours(piece, hx)
                outputs.append(output)
            return torch.cat(outputs), hx

    pieces = Pieces()
    pieces.layer = ours
    same(run(ours, input), run(pieces, input))
    with torch.no_grad():
        expected = theirs(input)[0]
        output, _ = ours(input, lengths=torch.tensor([69_999]))
        assert_close(output[:-1], expected[:-1])
        assert not output[-1].any()
        assert_close(ours(input)[0], expected)


# --- gradients, again and again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_from_run_to_run(kind, dtype):
    layer = getattr(rnnfast, kind)(20, 33, 2, bidirectional=True, dtype=dtype)
    input = torch.randn(15, 9, 20).to(dtype)
    first = run(layer, input)
    for _ in range(3):
        for a, b in zip(run(layer, input), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"lengths": [4, 6, 0]}, {"resets": True}], ids=["dense", "lengths", "resets"])
def test_second_backward_equals_the_first(kind, options):
    """And nothing that was saved, nor any argument, is written on the way."""
    layer = getattr(rnnfast, kind)(4, 5, 2, bidirectional=True)
    if "resets" in options:
        options = {"resets": torch.rand(6, 3) < 0.3}
    input = torch.randn(6, 3, 4, requires_grad=True)
    hx = torch.randn(4, 3, 5, requires_grad=True)
    wanted = [input, hx, *layer.parameters()]
    before = [tensor.detach().clone() for tensor in wanted]
    unpacked = []

    def pack(tensor):
        return tensor, tensor.detach().clone()

    def unpack(pair):
        tensor, copy = pair
        # As bits: where a row has ended, saved values are undefined and may be NaN.
        assert torch.equal(tensor.detach().contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8))
        unpacked.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        results = leaves(layer(input, (hx, hx) if kind == "LSTM" else hx, **options))
        loss = sum(((i + 1) * result.square()).sum() for i, result in enumerate(results))
        outputs = [result.detach().clone() for result in results]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted, retain_graph=True)
        third = torch.autograd.grad(loss, wanted)
    assert unpacked
    for again in (second, third):
        for a, b in zip(again, first, strict=True):
            assert torch.equal(a, b)
    for a, b in zip([*results, *wanted], [*outputs, *before], strict=True):
        assert torch.equal(a, b)


def test_weights_changed_in_place_between_forward_and_backward_are_noticed():
    layer = rnnfast.GRU(4, 5)
    output, _ = layer(torch.randn(6, 3, 4))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_follows_the_weights(kind):
    """Whatever is kept between calls without gradients, a changed weight is seen, however it was changed."""
    theirs, ours = pair(kind, 4, 5, 2)
    input = torch.randn(6, 3, 4)
    with torch.no_grad():
        for change in range(5):
            ours(input)
            for layer in (theirs, ours):
                weight = layer.weight_hh_l1
                if change == 0:
                    weight.mul_(0.5)
                elif change == 1:
                    weight.data.mul_(0.5)
                elif change == 2:
                    weight.data = weight.data.clone() * 3
                elif change == 3:
                    weight.detach().numpy()[:] *= 2
                else:
                    torch.optim.SGD([weight], lr=0.1)
                    weight.sub_(0.01)
            same(leaves(ours(input)), leaves(theirs(input)))
    with torch.inference_mode():
        same(leaves(ours(input)), leaves(theirs(input)))


# --- tracing --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embedding = nn.Linear(3, 4)
        self.layer = layer
        self.out = nn.Linear(10, 2)

    def forward(self, input):
        return self.out(self.layer(self.embedding(input))[0])


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_compiles_whole(kind, inside):
    layer = getattr(rnnfast, kind)(4, 5, 2, bidirectional=True)
    model = Model(layer) if inside else layer
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(6, 3, 3 if inside else 4)
    same(leaves(compiled(input)), leaves(model(input)))
    sum(result.sum() for result in leaves(compiled(input))).backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    sum(result.sum() for result in leaves(model(input))).backward()
    same(got, [p.grad for p in model.parameters()])


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiles_with_states_lengths_and_resets():
    layer = rnnfast.LSTM(4, 5, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input, hx = torch.randn(6, 3, 4), (torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    options = {"lengths": torch.tensor([4, 6, 0]), "resets": torch.rand(6, 3) < 0.3, "return_cell_states": True}
    same(leaves(compiled(input, hx, **options)), leaves(layer(input, hx, **options)))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_lengths_of_the_batch_do_not_recompile():
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    model = Model(rnnfast.GRU(4, 5, bidirectional=True))
    compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=True)
    # Sizes unlike the features: where two are equal, Dynamo takes them for one.
    for steps, batch in ((6, 5), (7, 5), (9, 4), (5, 2), (30, 8)):
        input = torch.randn(steps, batch, 3)
        assert_close(compiled(input), model(input))
    assert len(graphs) == 1


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_modules_are_treated_as_before(kind):
    """Refused in a graph, unless the user allows them: whether ours are compiled in between or not."""
    theirs, ours = Model(getattr(nn, kind)(4, 5, bidirectional=True)), Model(rnnfast.GRU(4, 5, bidirectional=True))
    input = torch.randn(6, 3, 3)
    both = nn.Sequential(nn.Sequential(ours, nn.Linear(2, 3)), theirs)
    for model in (theirs, both):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, fullgraph=True, backend="eager")(input)
        assert torch._dynamo.config.allow_rnn is False
        assert_close(torch.compile(model, backend="eager")(input), model(input))
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(input), ours(input))
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_close(torch.compile(ours, fullgraph=True, backend="eager")(input), ours(input))
        assert torch._dynamo.config.allow_rnn is True
        torch._dynamo.reset()
        assert_close(torch.compile(theirs, fullgraph=True, backend="eager")(input), theirs(input))
    assert torch._dynamo.config.allow_rnn is False


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_swapped_model_compiles_whole():
    model, input = Model(nn.LSTM(4, 5, bidirectional=True)), torch.randn(6, 3, 3)
    rnnfast.accelerate(model)
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(input), model(input))


@pytest.mark.parametrize(
    "order",
    ["import rnnfast, torch._dynamo", "import torch._dynamo, rnnfast"],
    ids=["rnnfast first", "dynamo first"],
)
def test_importing_is_light_and_the_order_does_not_matter(order):
    code = f"""
import sys
if "{order}".startswith("import rnnfast"):
    import rnnfast
    assert not [name for name in sys.modules if name.startswith("torch._dynamo")], "Dynamo was imported early"
    assert not [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "pandas", "triton")]
{order}
from torch._dynamo.variables.builder import VariableBuilder
assert VariableBuilder.wrap_module._rnnfast
waiting = [finder.name for finder in sys.meta_path if type(finder).__module__.startswith("rnnfast")]
assert waiting in ([], ["torch.utils.flop_counter"]), waiting
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_without_the_place_to_hook_nothing_changes():
    class VariableBuilder:
        def wrap_module(self, value):
            return "untouched"

    original = VariableBuilder.wrap_module
    for builder in (types.ModuleType("empty"), types.ModuleType("no_config"), types.ModuleType("no_flag")):
        if builder.__name__ != "empty":
            builder.VariableBuilder = VariableBuilder
        if builder.__name__ == "no_flag":
            builder.config = types.SimpleNamespace()
        _dynamo_hook._wrap(builder)
        assert VariableBuilder.wrap_module is original


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(kind, strict):
    model = Model(getattr(rnnfast, kind)(4, 5, bidirectional=True)).eval()
    shapes = {"input": {0: torch.export.Dim("steps", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (torch.randn(6, 3, 3),), dynamic_shapes=shapes, strict=strict)
    for steps, batch in ((6, 3), (9, 5)):
        input = torch.randn(steps, batch, 3)
        assert_close(program.module()(input), model(input))
