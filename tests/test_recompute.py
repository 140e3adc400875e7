"""Layers that recompute give what they give without it, whatever their cell, options and rows; and keep what they say.

In float64: the pieces of a call add up in another order, and in no other way differ from the whole.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from emulated_library import emulated_problem
from recompute_cases import DOUBLE, PLAIN, ROWS, WITH_OPTIONS, B, H, I, T, held, input_of, made, name_of
from rnnfast.cli import main
from rnnfast.recompute.memory import WAYS, Memory, Training, best_way, in_words, memory_of
from rnnfast.recompute.pieces import Pieces, count_of_pieces, steps_of_a_piece
from rnnfast.recompute.settings import bytes_of, training_of
from rnnfast.sequences import Sequences
from triton_interpreter import triton_problem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_outputs_and_gradients_are_the_same(case: tuple[str, dict[str, Any]], rows: str) -> None:
    held(made(*case, batch_first="batch_first" in rows), rows)


@pytest.mark.parametrize("rows", ["dense", "both, batch_first", "packed"])
@pytest.mark.parametrize("case", WITH_OPTIONS, ids=name_of)
def test_layers_with_options_too(case: tuple[str, dict[str, Any]], rows: str) -> None:
    # The sLSTM's state has a part that its own tests hold; without states here.
    held(made(*case, batch_first="batch_first" in rows), rows, ("gates", "chunks", 3), with_states=case[0] != "SLSTM")


@pytest.mark.parametrize(
    "case",
    [
        ("LSTM", {"proj_size": 2, "bidirectional": True}),
        ("GRU", {}),
        ("LSTM", {"zoneout": 0.3, "recurrent_dropout": 0.3}),
        ("GRU", {"reset_after": False, "recurrent_dropout": 0.3}),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("name", ["reference", "emulated", "triton"])
def test_other_backends(name: str, case: tuple[str, dict[str, Any]]) -> None:
    problem = {"emulated": emulated_problem, "triton": triton_problem}.get(name, lambda: None)()
    if problem is not None:
        pytest.skip(problem)
    with rnnfast.backend(name):
        # The interpreter takes seconds for what the others do at once.
        held(made(*case), "lengths", ("gates", 2), steps=4 if name == "triton" else T)


@pytest.mark.parametrize("way", ["gates", "chunks", 3])
def test_every_c_t_has_its_gradient(way: Any) -> None:
    module = made("LSTM", {"bidirectional": True, "num_layers": 2})
    grads = []
    for each in (None, way):
        module.recompute = each
        module.zero_grad()
        torch.manual_seed(3)
        output, _, cell_states = module(torch.randn(T, B, I, **DOUBLE), return_cell_states=True)
        (output.square().sum() + (cell_states * torch.randn_like(cell_states)).sum()).backward()
        grads.append([cell_states, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["gates", "chunks", 2])
@pytest.mark.parametrize(
    "case", [("LSTM", {}), ("RNN", {"bidirectional": True}), ("GRU", {"reset_after": False})], ids=name_of
)
def test_first_and_second_derivatives_and_several_at_once(case: tuple[str, dict[str, Any]], way: Any) -> None:
    module = made(*case, recompute=way)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]

    arguments = [torch.randn(3, 2, I, **DOUBLE), *(parameter.detach() for parameter in module.parameters())]
    arguments = [argument.clone().requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(call, arguments, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("way", ["gates", 3])
@pytest.mark.parametrize("frozen", ["input", "weight_ih_l0", "weight_hh_l0_reverse", "bias_hh_l0", "all but one"])
def test_what_is_frozen_gets_none(frozen: str, way: Any) -> None:
    grads = []
    for each in (None, way):
        torch.manual_seed(2)
        module = made("GRU", {"bidirectional": True}, recompute=each)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name != frozen if frozen != "all but one" else name == "bias_ih_l0_reverse")
        x = torch.randn(T, B, I, **DOUBLE, requires_grad=frozen not in ("input", "all but one"))
        module(x)[0].square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]]
    for one, other in zip(*grads, strict=True):
        assert one is None or torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["gates", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_other_types_are_as_near_to_float64(dtype: torch.dtype, way: Any) -> None:
    """Sums over pieces are no worse than over all rows: 16-bit types add them up in 32 bits."""
    torch.manual_seed(4)
    module = nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    ours = rnnfast.LSTM(I, H, bidirectional=True, dtype=dtype)
    ours.load_state_dict(module.state_dict())
    module.load_state_dict(ours.state_dict())
    x, grad = torch.randn(200, B, I).to(dtype), torch.randn(200, B, 2 * H).to(dtype)
    module(x.double())[0].backward(grad.double())
    errors = []
    for each in (None, way):
        ours.recompute = each
        ours.zero_grad()
        output = ours(x)[0]
        output.backward(grad)
        pairs = zip(ours.parameters(), module.parameters(), strict=True)
        errors.append(max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs))  # type: ignore[operator]
    assert errors[1] < 1.5 * errors[0] + torch.finfo(dtype).eps


def test_autocast_transforms_and_no_gradients() -> None:
    module = rnnfast.LSTM(I, H, recompute="chunks")
    plain = copy.deepcopy(module)
    plain.recompute = None
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.weight_hh_l0.grad is not None
    assert module.weight_hh_l0.grad.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(module(x)[0], plain(x)[0])
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, x: Tensor, of: Any) -> Tensor:
        return torch.func.functional_call(of, parameters, (x,))[0].square().sum()

    several, of_each = torch.randn(3, T, B, I), torch.vmap(torch.func.grad(loss), (None, 0, None))
    for one, other in zip(*(of_each(parameters, several, of).values() for of in (module, plain)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("way", [None, "gates", "chunks"])
@pytest.mark.parametrize("steps", [2, T])
@pytest.mark.parametrize(
    "case",
    [("LSTM", {}), ("LSTM", {"peephole": True}), ("GRU", {"reset_after": False, "num_heads": 2}), ("SLSTM", {})],
    ids=name_of,
)
def test_backward_inside_autocast_is_in_the_types_of_forward(case: Any, steps: int, way: str | None) -> None:
    """The first and the second derivative, and several at once."""
    module, x = made(*case, dtype=torch.float32, recompute=way), torch.randn(steps, B, I)
    weights = [module.weight_hh_l0]

    def derivatives(enabled: bool) -> list[Tensor]:
        output = module(x)[0]
        several = torch.eye(output.numel())[:3].reshape(3, *output.shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(output.square().sum(), weights, create_graph=True)
            at_once = torch.autograd.grad(output, weights, several, is_grads_batched=True, retain_graph=True)
        # What is differentiated twice are torch's products, which inside autocast follow that.
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and module._options is None):
            second = torch.autograd.grad(first[0].square().sum(), weights)
        return [*first, *second, *at_once]

    for one, other in zip(derivatives(True), derivatives(False), strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "rows", "way"),
    [
        *itertools.product(["auto", "reference"], ["both", "packed"], [None, "gates", 2]),
        # The interpreter takes seconds for what the others do at once.
        *itertools.product(["triton"], ["both", "packed"], [None]),
    ],
)
def test_no_default_device_is_counted_on(name: str, rows: str, way: Any) -> None:
    problem = triton_problem() if name == "triton" else None
    if problem is not None:
        pytest.skip(problem)
    for case in (("LSTM", {"bidirectional": True}), ("GRU", {"bidirectional": True, "recurrent_dropout": 0.2})):
        module = made(*case, recompute=way)
        x, given = input_of(rows)
        x, given = (
            x[:4],
            {name: value.clamp(max=4) if name == "lengths" else value[:4] for name, value in given.items()},
        )
        data = pack_padded_sequence(x, [4, 3, 3, 1]) if rows == "packed" else x
        grads = []
        for device in ("cpu", "meta"):
            torch.manual_seed(0)
            module.zero_grad()
            with rnnfast.backend(name), torch.device(device):
                output = module(data, **given)[0]
                (output.data if rows == "packed" else output).square().sum().backward()
            grads.append([parameter.grad for parameter in module.parameters()])
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("way", [None, "gates", "chunks"])
@pytest.mark.parametrize(
    "case", [("LSTM", {}), ("LSTM", {"zoneout": 0.2}), ("GRU", {"bidirectional": True})], ids=name_of
)
@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([20, 5, 1], "batch_sizes: expected a sum of 27, got 26"),
        ([20, 5, 3], "batch_sizes: expected a sum of 27, got"),
        ([10, 12, 5], "batch_sizes: expected positive sizes that do not increase"),
        ([10, 10, 7, 0], "batch_sizes: expected positive sizes that do not increase"),
    ],
)
def test_packed_rows_that_do_not_fit_are_refused_as_without(case: Any, sizes: list[int], text: str, way: Any) -> None:
    module = made(*case, recompute=way)
    with pytest.raises(RuntimeError, match=text):
        module(PackedSequence(torch.randn(27, I, **DOUBLE), torch.tensor(sizes)))


@pytest.mark.parametrize("way", [None, "gates", "chunks"])
def test_states_that_do_not_fit_are_refused_as_without(way: Any) -> None:
    weights = list(made("LSTM", {}).parameters())
    h, c, wrong = (torch.zeros(1, batch, H, **DOUBLE) for batch in (B, B, B + 1))
    for states, name in (((wrong, c), "hx"), ((h, wrong), "cx")):
        with pytest.raises(RuntimeError, match=rf"rnnfast::layer.*: {name}: expected shape \(?\[?1, 4, 4"):
            rnnfast.functional.lstm(
                torch.randn(10, I, **DOUBLE), weights, states, batch_sizes=torch.tensor([4, 3, 3]), recompute=way
            )


@pytest.mark.parametrize("way", ["gates", "chunks"])
def test_results_may_be_written_into_as_without(way: str) -> None:
    """What is made again is not kept: only "gates" needs the output as it was, and says so."""
    module = made("LSTM", {}, recompute=way)
    output, (h_n, c_n) = module(torch.randn(T, B, I, **DOUBLE))
    h_n.mul_(2)
    c_n.mul_(2)
    output.mul_(2)
    if way == "chunks":
        output.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("way", ["gates", "chunks"])
@pytest.mark.parametrize("case", [PLAIN[0], ("GRU", {"zoneout": 0.2, "recurrent_dropout": 0.2})], ids=name_of)
def test_an_empty_batch_and_torchs_checkpoints(case: tuple[str, dict[str, Any]], way: str) -> None:
    module = made(*case, recompute=way)
    module(torch.randn(T, 0, I, **DOUBLE))[0].sum().backward()
    assert not module.weight_hh_l0.grad.any()
    x = torch.randn(T, B, I, **DOUBLE, requires_grad=True)
    for reentrant in (False, True):
        torch.manual_seed(1)
        expected = torch.autograd.grad(module(x)[0].square().sum(), x)
        torch.manual_seed(1)
        output = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant)
        x.grad = None
        output.square().sum().backward()
        assert_close(x.grad, expected[0])


@pytest.mark.parametrize("way", ["gates", 2])
def test_complex_numbers_pass_to_the_reference_as_without(way: Any) -> None:
    kind = {"dtype": torch.complex128}
    module, x = rnnfast.GRU(I, H, zoneout=0.2, **kind).eval(), torch.randn(5, 2, I, **kind)
    grads = []
    for each in (None, way):
        module.recompute = each
        module.zero_grad()
        with rnnfast.backend("reference"):
            module(x)[0].abs().sum().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
        module.zero_grad()
        module(x)[0].abs().sum().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    for other in grads[1:]:
        for one, another in zip(grads[0], other, strict=True):
            assert_close(one, another, rtol=1e-10, atol=1e-10)


def test_a_pass_may_be_repeated_and_needs_no_more_than_asked() -> None:
    module = made("GRU", {}, recompute="chunks")
    x = torch.randn(T, B, I, **DOUBLE, requires_grad=True)
    output, h_n = module(x)
    first = torch.autograd.grad(h_n.sum(), [x, module.weight_ih_l0], retain_graph=True)
    again = torch.autograd.grad(h_n.sum(), [x, module.weight_ih_l0], retain_graph=True)
    assert all(map(torch.equal, first, again))
    (grad,) = torch.autograd.grad(output.sum(), [x])
    assert grad.shape == x.shape


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1}], ids=str)
def test_tools_that_look_at_operations_see_what_runs(options: dict[str, Any]) -> None:
    """Of forward what it is without; in backward forward once more."""
    counts = []
    for way in (None, "gates", "chunks"):
        module = rnnfast.LSTM(I, H, bidirectional=True, recompute=way, **options)
        with FlopCounterMode(display=False) as counter:
            output = module(torch.randn(T, B, I))[0]
            forward = counter.get_total_flops()
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    (forward, plain), *others = counts
    assert forward > 0
    for of_forward, total in others:
        # A state that is not given is one of zeros, which the first step multiplies.
        assert forward <= of_forward < 1.1 * forward
        assert plain + forward <= total < 1.1 * (plain + forward)


# --- what is kept -------------------------------------------------------------------------------------------------


def kept_by(module: Any, x: Tensor) -> int:
    """Bytes of the output and of what the call saves, each storage once, but for its input and parameters."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)[0]
    pack(output.detach())
    return sum(storages.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        ("LSTM", {}),
        ("LSTM", {"num_layers": 3, "bidirectional": True}),
        ("LSTM", {"proj_size": 8, "num_layers": 2}),
        ("GRU", {"bidirectional": True}),
        ("MGU", {}),
        ("RNN", {"num_layers": 2}),
        ("LSTM", {"zoneout": 0.3}),
        ("LSTM", {"layer_norm": "separate"}),
        ("GRU", {"layer_norm": "joint"}),
        ("GRU", {"reset_after": False}),
        ("RNN", {"layer_norm": "joint"}),
    ],
    ids=name_of,
)
def test_a_call_keeps_what_the_formula_says(case: tuple[str, dict[str, Any]], way: str | None) -> None:
    module = getattr(rnnfast, case[0])(8, 16, recompute=way, **case[1])
    x = torch.randn(1024, 4, 8)
    options = module._options if module._options is not None else None
    training = training_of(
        module._mode(), x, module._weights(), Sequences(), module.num_layers, module.bidirectional, options
    )
    memory, found = memory_of(training, way), kept_by(module, x)
    # Beside it final states, and statistics of rows.
    assert memory.kept <= found < 1.04 * memory.kept + 20_000


PEAK = """
import re, torch, rnnfast
torch.set_num_threads(1)
def resident(of):
    return int(re.search(rf"{{of}}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
module = rnnfast.LSTM(16, 128, recompute={way!r})
module(torch.randn(2048, 8, 16))[1][0].sum().backward()
x = torch.randn({steps}, 8, 16)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS")
module(x)[1][0].sum().backward()
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("way", WAYS)
def test_the_peak_is_what_the_formula_says(way: str | None) -> None:
    """In a process of its own: of the operating system."""
    steps = 12_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(way=way, steps=steps)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    training = Training("LSTM", 16, 128, steps, 8 * steps, whole_backward=True, output_gradient=False)
    # Less where memory of the call before serves again; more by workspaces and what malloc holds.
    memory = memory_of(training, way)
    assert memory.kept * 0.85 - 16e6 < int(done.stdout) < memory.peak * 1.15 + 16e6


@pytest.mark.parametrize("how", WAYS)
def test_the_formula_in_numbers(how: str | None) -> None:
    """T = 100,000, B = 8, H = 256, float32, by hand: 819.2 MB are a number of every unit in every step."""
    training = Training("LSTM", 16, 256, 100_000, 800_000, whole_backward=True, output_gradient=False)
    each = 819_200_000
    of_units = {None: 6, "gates": 2, "chunks": 1}[how]
    borders = 0 if how is None else 391 * 8 * 512 * 4
    assert memory_of(training, how).kept == of_units * each + borders
    assert memory_of(training, how).peak < of_units * each + 60e6
    assert memory_of(training, how, 10).kept == of_units * each + (0 if how is None else 10 * 8 * 512 * 4)


def test_auto_takes_the_first_that_fits() -> None:
    training = Training("LSTM", 16, 256, 100_000, 800_000, whole_backward=True)
    peaks = {how: memory_of(training, how).peak for how in WAYS}
    assert peaks[None] > peaks["gates"] > peaks["chunks"]
    for how, peak in peaks.items():
        assert best_way(training, peak) == how
    assert best_way(training, 1) == "chunks"
    module = rnnfast.LSTM(16, 32, recompute="auto", memory_budget="1 GB")
    x = torch.randn(512, 2, 16)
    assert "Recomputed" not in str(module(x)[0].grad_fn)
    module.memory_budget = 600_000
    assert "Recomputed" in str(module(x)[0].grad_fn)
    assert "takes 'chunks'" in str(rnnfast.explain(module, x))
    with torch.no_grad():
        assert "recompute" not in str(rnnfast.explain(module, x))


@pytest.mark.parametrize(("steps", "rows", "count"), [*itertools.product([1, 7, 5000, 100_000], [1, 8, 512], [0, 3])])
def test_pieces_cover_every_step_once(steps: int, rows: int, count: int) -> None:
    length = steps_of_a_piece(count, steps, steps * rows)
    assert 1 <= length <= steps
    assert (count_of_pieces(steps, length) - 1) * length < steps <= count_of_pieces(steps, length) * length
    if count:
        assert count_of_pieces(steps, length) <= count
    elif steps > 16:
        # Of the order of the root of T, or of rows that make a fast product.
        assert length <= max(steps / 8 + 1, steps**0.5, 2048 / rows + 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", ["dense", "batch_first", "lengths", "packed"])
def test_what_is_read_of_a_piece_is_written_where_it_was(rows: str, reverse: bool) -> None:
    x, given = input_of(rows)
    sequences = Sequences(lengths=given.get("lengths"), batch_first=rows == "batch_first")
    if rows == "packed":
        packed = pack_padded_sequence(x, [13, 9, 7, 1])
        x, sequences = packed.data, Sequences(packed.batch_sizes)
    pieces, copied = Pieces(x, sequences, 5, reverse), torch.zeros_like(x)
    for piece in pieces.order():
        pieces.write(piece, copied, pieces.read(piece, x))
    assert torch.equal(copied, x)


# --- what users say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"recompute": "gate"}, ValueError, "LSTM: recompute: expected None, 'gates', 'chunks', a number of chunks or"),
        ({"recompute": 0}, ValueError, "LSTM: recompute: expected from 1 to 2\\*\\*63 - 1 chunks, got 0"),
        ({"recompute": 2**63}, ValueError, "LSTM: recompute: expected from 1 to .* chunks, got 9223372036854775808"),
        ({"recompute": np.array([1, 2])}, TypeError, r"LSTM: recompute: expected None, 'gates'.*got array\(\[1, 2\]\)"),
        ({"recompute": True}, TypeError, "LSTM: recompute: expected None, 'gates'.*got True"),
        ({"recompute": 2.5}, TypeError, "LSTM: recompute: expected None, 'gates'.*got 2.5"),
        ({"recompute": "auto"}, ValueError, "LSTM: memory_budget: expected bytes with recompute='auto', got None"),
        ({"recompute": "gates", "memory_budget": 5}, ValueError, "goes with recompute='auto', got recompute='gates'"),
        ({"memory_budget": 5}, ValueError, "LSTM: memory_budget: goes with recompute='auto', got recompute=None"),
        ({"recompute": "auto", "memory_budget": "much"}, ValueError, "expected bytes, as 2_000_000_000 or '2 GB'"),
        ({"recompute": "auto", "memory_budget": -1}, ValueError, "memory_budget: expected bytes.*got -1"),
        ({"recompute": "auto", "memory_budget": 10**400}, ValueError, "memory_budget: expected bytes.*got 1000"),
        (
            {"recompute": "auto", "memory_budget": "\uff12 GB"},
            ValueError,
            "memory_budget: expected bytes.*got '\uff12 GB'",
        ),
        ({"recompute": "auto", "memory_budget": [1]}, TypeError, r"memory_budget: expected bytes.*got \[1\]"),
        (
            {"recompute": "gates", "batch_norm": "sequence"},
            ValueError,
            "LSTM: recompute: expected None with batch_norm, whose statistics are of all steps, got 'gates'",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rnnfast.LSTM(I, H, **arguments)
    if len(arguments) == 1 and "recompute" in arguments:
        with pytest.raises(error, match=text):
            rnnfast.LSTM(I, H).recompute = arguments["recompute"]


def test_attributes_may_be_changed_and_travel() -> None:
    module = rnnfast.LSTM(I, H, num_layers=2)
    with pytest.raises(ValueError, match="recompute: expected None, 'gates'"):
        module.recompute = "some"
    with pytest.raises(ValueError, match="memory_budget: expected bytes with recompute='auto'"):
        module.recompute = "auto"
    assert module.recompute is None
    module.memory_budget = "1.5 GiB"
    module.recompute = "auto"
    assert (module.recompute, module.memory_budget) == ("auto", 3 << 29)
    with pytest.raises(ValueError, match="memory_budget: expected bytes with recompute='auto', got None"):
        module.memory_budget = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.recompute, other.memory_budget) == ("auto", 3 << 29)
    module.recompute = 4
    assert repr(module) == "LSTM(3, 4, num_layers=2, recompute=4, memory_budget=1610612736)"
    assert repr(rnnfast.MGU(I, H, recompute="gates")) == "MGU(3, 4, recompute='gates')"
    assert "recompute" not in rnnfast.LSTM(I, H).state_dict()
    with pytest.raises(TypeError, match="recompute"):
        rnnfast.LSTMCell(I, H, recompute="gates")


def test_functional() -> None:
    module = made("LSTM", {})
    x, weights = torch.randn(T, B, I, **DOUBLE), list(module.parameters())
    grads = []
    for way in ({}, {"recompute": "gates"}, {"recompute": "auto", "memory_budget": 1}):
        output, _ = rnnfast.functional.lstm(x, weights, **way)
        assert ("Recomputed" in str(output.grad_fn)) == bool(way)
        grads.append(torch.autograd.grad(output.square().sum(), weights))
    for one, other in itertools.product(grads[0], grads[1:]):
        index = next(i for i, grad in enumerate(grads[0]) if grad is one)
        assert_close(other[index], one, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"gru: recompute: expected from 1 to .* chunks, got -2"):
        rnnfast.functional.gru(x, list(made("GRU", {}).parameters()), recompute=-2)


def test_a_size_in_bytes() -> None:
    assert [bytes_of("x", text) for text in ("12", "1 kB", "2.5MB", "1 GiB", 7)] == [12, 1000, 2_500_000, 1 << 30, 7]
    assert [in_words(size) for size in (0, 999, 1000, 819_200_000, 5e9, 2e13)] == [
        "0 B", "999 B", "1 kB", "819 MB", "5 GB", "20,000 GB",
    ]  # fmt: skip


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "memory --cell lstm --hidden 256 --batch 8 --steps 100000 --input 16 --last-step --budget".split()
    assert main([*words, "2 GB"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+) +([\d.]+ GB|\d+ MB) +([\d.]+ GB|\d+ MB)$", text, re.MULTILINE) == [
        ("None", "4.92 GB", "4.92 GB"), ("gates", "1.64 GB", "1.67 GB"), ("chunks", "826 MB", "851 MB"),
    ]  # fmt: skip
    assert text.splitlines()[0] == "LSTM, I=16, H=256, B=8, T=100000, fp32, training on cpu"
    assert text.splitlines()[-1] == "recompute='auto', memory_budget='2 GB': 'gates'"
    assert main([*words, "1 kB"]) == 0
    assert capsys.readouterr().out.endswith("'chunks', which does not fit either\n")
    for wrong in (["--budget", "much"], ["--projection", "256"], ["--cell", "gru", "--projection", "2"]):
        with pytest.raises(SystemExit):
            main(["memory", "--hidden", "256", *wrong])


def test_memory_is_a_pair_of_bytes() -> None:
    assert memory_of(Training("RNN_TANH", 1, 2, 10, 30), None) == Memory(30 * 2 * 4, 30 * 2 * 4 * 3)
