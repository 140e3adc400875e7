"""Loops of steps in training: the gradients of the weights are put off until all steps are done (rnnfast/steps.py), and
nobody must notice but by the clock. Everything is compared with torch.nn's modules."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import ops, steps
from test_build import in_new_process

backends = sys.modules["rnnfast.backends"]
pytestmark = pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")

KINDS = ["LSTM", "GRU", "RNN"]
over_kinds = pytest.mark.parametrize("kind", KINDS)
IN, H, B = 5, 7, 3


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our step at every size."""
    monkeypatch.setattr(backends, "torchs_step_is_faster", lambda *call: None)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No rows of a pass outlive it, and no step its graph."""
    yield
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is steps.Rows]
    assert not steps._alive


class Loop(nn.Module):
    """A cell, or a layer called with one step at a time: (T, B, IN) to (T, B, H)."""

    def __init__(self, home: Any, kind: str, layer: bool = False, dtype: torch.dtype = torch.float64, **options: Any):
        super().__init__()
        self.kind, self.layer = kind, layer
        self.core = getattr(home, kind if layer else kind + "Cell")(IN, H, dtype=dtype, **options)

    def forward(self, input: Tensor, state: Any = None) -> Tensor:
        return self.states(input, state)[0]

    def states(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs = []
        for row in input:
            if self.layer:
                first = self.core.batch_first
                output, state = self.core(row.unsqueeze(1 if first else 0), state)
                outputs.append(output.squeeze(1 if first else 0))
            else:
                state = self.core(row, state)
                outputs.append(state[0] if self.kind == "LSTM" else state)
        return torch.stack(outputs), state


def pair(kind: str, **options: Any) -> list[Loop]:
    """torch.nn's and ours, with the same weights."""
    loops = [Loop(home, kind, **options) for home in (nn, rnnfast)]
    loops[1].load_state_dict(loops[0].state_dict())
    return loops


def data(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, B, IN, dtype=dtype)


def gradients(loss: Callable[[Loop], Tensor], loop: Loop, more: Sequence[Tensor] = (), **options: Any) -> list[Tensor]:
    wanted = [*more, *(weight for weight in loop.parameters() if weight.requires_grad)]
    return list(torch.autograd.grad(loss(loop), wanted, **options))


def same(loops: list[Loop], loss: Callable[[Loop], Tensor], more: Sequence[Tensor] = ()) -> None:
    assert_close(gradients(loss, loops[1], more), gradients(loss, loops[0], more))


def ends_in(output: Tensor, name: str) -> int:
    """How many nodes of that name the graph of `output` has."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [before for before, _ in node.next_functions]
    return sum(node.name() == name for node in seen)


# ---- the gradients ---------------------------------------------------------------------------------------------------

FORMS = {"cell": {}, "no bias": {"bias": False}, "layer": {"layer": True}, "layers": {"layer": True, "num_layers": 2}}
FORMS["batch first"] = {"layer": True, "batch_first": True}
FORMS["both ways"] = {"layer": True, "bidirectional": True}


@over_kinds
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_are_torchs(kind: str, form: str, length: int, backend: str) -> None:
    loops, input = pair(kind, **FORMS[form]), data(length).requires_grad_()
    expected = gradients(lambda loop: loop(input).sin().sum(), loops[0], [input])
    with rnnfast.backend(backend):
        assert_close(gradients(lambda loop: loop(input).sin().sum(), loops[1], [input]), expected)
        output = loops[1](input)
    put_off = form != "both ways" and length > 1
    assert ends_in(output, "WeightGradientsBackward") == (FORMS[form].get("num_layers", 1) if put_off else 0)


@over_kinds
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight", "bias", ""])
def test_what_is_frozen_gets_none(kind: str, frozen: str, of_input: bool) -> None:
    loops, input = pair(kind), data(4).requires_grad_(of_input)
    for loop in loops:
        for name, weight in loop.core.named_parameters():
            weight.requires_grad_(not frozen or not name.startswith(frozen))
    same(loops, lambda loop: loop(input).sin().sum(), [input] if of_input else [])


@over_kinds
def test_nothing_of_the_weights_is_made_where_nobody_asks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops, input = pair(kind), data(5).requires_grad_()
    monkeypatch.setattr(steps.Rows, "gradients", lambda *_: pytest.fail("gradients of weights"))
    # Its first step, which makes its own, is there for the states of the others alone.
    for weight in loops[1].parameters():
        weight.requires_grad_(False)
    state = loops[1].states(input[:1])[1]
    for weight in loops[1].parameters():
        weight.requires_grad_(True)
    output = loops[1](input[1:], state).sin().sum()
    expected = torch.autograd.grad(loops[0](input)[1:].sin().sum(), input)
    assert_close(torch.autograd.grad(output, input), expected)


@over_kinds
def test_one_product_for_all_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    product = ops.matmul
    monkeypatch.setattr(steps.ops, "matmul", lambda a, b: shapes.append(a.shape) or product(a, b))
    loop, input = pair(kind)[1], data(9)
    loop(input).sum().backward()
    # The first step's own, and one of all others, for W_ih; it had no state, so for W_hh only the latter.
    assert sorted(rows for _, rows in shapes) == [B, 8 * B, 8 * B]


@over_kinds
def test_a_state_that_another_step_made(kind: str) -> None:
    """Steps by torch's own op, which the rule may choose for the first, lead to ours."""
    loops, (first, _), input = pair(kind), pair(kind), data(4)
    same(loops, lambda loop: loop(input[1:], first.states(input[:1])[1]).sin().sum(), list(first.parameters()))
    assert ends_in(loops[1](input[1:2], first.states(input[:1])[1]), "WeightGradientsBackward") == 1


@over_kinds
@pytest.mark.parametrize("layer", [False, True])
def test_many_rows_make_their_own_products(kind: str, layer: bool) -> None:
    loops, input = pair(kind, layer=layer), torch.randn(3, 65, IN, dtype=torch.float64, requires_grad=True)
    same(loops, lambda loop: loop(input).sin().sum(), [input])
    assert ends_in(loops[1](input), "WeightGradientsBackward") == 0
    assert ends_in(loops[1](input[:, :64]), "WeightGradientsBackward") == 1


@over_kinds
def test_states_given_and_their_gradients(kind: str) -> None:
    loops, input = pair(kind), data(4)
    states = [torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in range(2 if kind == "LSTM" else 1)]
    same(loops, lambda loop: loop(input, tuple(states) if kind == "LSTM" else states[0]).sin().sum(), states)


@over_kinds
@pytest.mark.parametrize("last", [True, False], ids=["last state", "cell states"])
def test_gradients_that_come_from_states_alone(kind: str, last: bool) -> None:
    loops, input = pair(kind), data(4).requires_grad_()

    def loss(loop: Loop) -> Tensor:
        state = loop.states(input)[1]
        return (state if kind != "LSTM" else state[0] if last else state[1]).sin().sum()

    same(loops, loss, [input])


@over_kinds
def test_second_derivatives(kind: str) -> None:
    loops, input = pair(kind), data(3).requires_grad_()
    found = []
    for loop in loops:
        first = gradients(lambda loop: loop(input).sin().sum(), loop, [input], create_graph=True)
        norm = sum(grad.square().sum() for grad in first)
        found.append([*first, *torch.autograd.grad(norm, [input, *loop.parameters()])])
    assert_close(found[1], found[0])


@over_kinds
def test_batched_gradients(kind: str) -> None:
    """autograd's own, which calls the backward pass once with batched tensors."""
    loops, input = pair(kind), data(3).requires_grad_()
    many = torch.randn(4, 3, B, H, dtype=torch.float64)
    found = [
        torch.autograd.grad((output := loop(input)), [input, *loop.parameters()], many, is_grads_batched=True)
        for loop in loops
    ]
    del output
    assert_close(found[1], found[0])


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [7, 200])
def test_the_other_types(kind: str, dtype: torch.dtype, hidden: int) -> None:
    """Large products of 16-bit types are ATen's, small ones ours."""
    cells = [getattr(home, kind + "Cell")(hidden, hidden, dtype=torch.float64) for home in (nn, rnnfast)]
    cells[1].load_state_dict(cells[0].state_dict())
    cells[1].to(dtype)
    input = torch.randn(4, 17, hidden, dtype=torch.float64).to(dtype)
    found = []
    for cell in cells:
        cell.zero_grad()
        state, leaf = None, input.to(cell.weight_hh.dtype).requires_grad_()
        for row in leaf:
            state = cell(row, state)
        (state[0] if kind == "LSTM" else state).sum().backward()
        found.append([leaf.grad, *(weight.grad for weight in cell.parameters())])
    eps = torch.finfo(dtype).eps
    for right, got in zip(*found, strict=True):
        scale = float(right.abs().max())
        assert_close(got.double(), right, rtol=0.0, atol=(8 if dtype != torch.float32 else 60) * eps * max(scale, 1))


# ---- passes ----------------------------------------------------------------------------------------------------------


@over_kinds
def test_two_passes_over_one_graph(kind: str) -> None:
    loops, input = pair(kind), data(4)
    for loop in loops:
        loss = loop(input).sin().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close([w.grad for w in loops[1].parameters()], [w.grad for w in loops[0].parameters()])


@over_kinds
def test_passes_over_parts_of_one_graph(kind: str) -> None:
    loops, input = pair(kind), data(6)
    for loop in loops:
        output = loop(input)
        output[2].sum().backward(retain_graph=True)
        output[4].sin().sum().backward(retain_graph=True)
        output[5].cos().sum().backward()
    assert_close([w.grad for w in loops[1].parameters()], [w.grad for w in loops[0].parameters()])


@over_kinds
def test_two_loops_in_one_graph_and_what_uses_the_weights_beside(kind: str) -> None:
    loops, inputs = pair(kind), [data(3), data(4)]

    def loss(loop: Loop) -> Tensor:
        outputs = [loop(input) for input in inputs]
        return sum(output.sin().sum() for output in outputs) + loop.core.weight_hh.square().sum()

    same(loops, loss)


@over_kinds
def test_a_pass_that_fails_leaves_nothing_and_the_next_is_right(kind: str) -> None:
    loops, input = pair(kind), data(5).requires_grad_()
    expected = gradients(lambda loop: loop(input).sin().sum(), loops[0])

    def fail(_: Tensor) -> None:
        raise ValueError("from a hook")

    output = loops[1](input)
    hook = input.register_hook(fail)
    inner = loops[1].states(input[:2])[1]
    state = inner[0] if kind == "LSTM" else inner
    broken = loops[1](input[2:], inner)
    state.register_hook(fail)
    for loss in (output.sum(), broken.sum()):
        with pytest.raises(ValueError, match="from a hook"):
            loss.backward(retain_graph=True)
    hook.remove()
    del broken, inner, state, loss
    assert_close(list(torch.autograd.grad(output.sin().sum(), list(loops[1].parameters()))), expected)


@over_kinds
def test_hooks_see_the_whole_gradient_once(kind: str) -> None:
    loop, input = pair(kind)[1], data(5)
    seen: list[Tensor] = []
    accumulated: list[Tensor] = []
    handles = [
        loop.core.weight_hh.register_hook(lambda grad: seen.append(grad.clone())),
        loop.core.weight_hh.register_post_accumulate_grad_hook(lambda weight: accumulated.append(weight.grad.clone())),
    ]
    loop(input).sum().backward()
    assert_close(seen, [loop.core.weight_hh.grad])
    assert_close(accumulated, [loop.core.weight_hh.grad])
    for handle in handles:
        handle.remove()


@over_kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(kind: str, reentrant: bool) -> None:
    loops, input = pair(kind), data(6).requires_grad_()

    for loop in loops:
        first = loop(input[:3])
        rest = checkpoint(lambda rows, loop=loop: loop(rows), input[3:] * first.mean(), use_reentrant=reentrant)
        (rest.sin().sum() + first.cos().sum()).backward()
    assert_close([w.grad for w in loops[1].parameters()], [w.grad for w in loops[0].parameters()])


@over_kinds
def test_saved_tensors_may_be_kept_elsewhere(kind: str) -> None:
    loops, input = pair(kind), data(4).requires_grad_()
    with save_on_cpu():
        same(loops, lambda loop: loop(input).sin().sum(), [input])


def test_passes_in_several_threads_at_once() -> None:
    loops, inputs = pair("GRU"), [data(30) for _ in range(4)]
    expected = [gradients(lambda loop, input=input: loop(input).sin().sum(), loops[0]) for input in inputs]
    found: list[Any] = [None] * 4
    outputs = [loops[1](input).sin().sum() for input in inputs]

    def run(i: int) -> None:
        for _ in range(10):
            own = loops[1](inputs[i]).sin().sum()
            for loss in (outputs[i], own):
                found[i] = torch.autograd.grad(loss, list(loops[1].parameters()), retain_graph=True)
                if any((a - b).abs().max() > 1e-9 for a, b in zip(found[i], expected[i], strict=True)):
                    return

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, right in zip(found, expected, strict=True):
        assert_close(list(got), right)


# ---- what changes in between -----------------------------------------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("name", ["weight_hh", "weight_ih", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("of_input", [True, False])
def test_weights_changed_before_the_pass(kind: str, name: str, of_input: bool) -> None:
    """As in torch.nn: an error where the first derivative needs them, and right numbers elsewhere."""
    outcomes = []
    loops, input = pair(kind), data(3).requires_grad_(of_input)
    for loop in loops:
        loss = loop(input).sin().sum()
        with torch.no_grad():
            getattr(loop.core, name).add_(1)
        wanted = list(loop.parameters())
        if name == "weight_hh" or (name == "weight_ih" and of_input):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, wanted)
        else:
            outcomes.append(torch.autograd.grad(loss, wanted))
        del loss
    assert_close(outcomes[1:], outcomes[:1])


@pytest.mark.parametrize("name", ["weight_ih", "bias_ih", "bias_hh"])
def test_what_the_second_derivative_needs_must_be_as_it_was(name: str) -> None:
    loop, input = pair("GRU")[1], data(3)
    loss = loop(input).sum()
    with torch.no_grad():
        getattr(loop.core, name).add_(1)
    with pytest.raises(RuntimeError, match=f"rnnfast: {name} has been modified by an inplace operation"):
        torch.autograd.grad(loss, list(loop.parameters()), create_graph=True)


def test_weights_replaced_within_a_loop() -> None:
    loops, input = pair("LSTM"), data(6)

    def loss(loop: Loop) -> Tensor:
        output, state = loop.states(input[:3])
        before = loop.core.weight_hh
        loop.core.weight_hh = nn.Parameter(before.detach() * 0.5)
        more = loop(input[3:], state)
        loop.core.weight_hh = before
        return output.sum() + more.sin().sum()

    same(loops, loss)


def test_a_weight_that_is_frozen_within_a_loop() -> None:
    loops, input = pair("GRU"), data(6)

    def loss(loop: Loop) -> Tensor:
        output, state = loop.states(input[:3])
        loop.core.weight_ih.requires_grad_(False)
        more = loop(input[3:], state)
        loop.core.weight_ih.requires_grad_(True)
        return output.sum() + more.sin().sum()

    same(loops, loss)


def test_a_step_of_a_training_loop_keeps_nothing_for_the_next() -> None:
    loop, input = pair("LSTM")[1], data(3)
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loop(input).square().sum().backward()
        optimizer.step()
        assert not steps._alive


# ---- what autograd knows of the weights ------------------------------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("change", ["written into", "detached"])
def test_weights_that_come_from_elsewhere_than_before(kind: str, change: str) -> None:
    """A step of an earlier graph is alive, and its weights are the same tensors, but of another graph."""
    cells, input = pair(kind), data(3)
    names = [name for name, _ in cells[0].core.named_parameters()]
    values = [weight.detach().clone() for weight in cells[0].core.parameters()]
    found = []
    for loop in cells:
        leaves = [[value.clone().requires_grad_() for value in values] for _ in range(2)]
        weights = [leaf * 1 for leaf in leaves[0]]

        def run(loop: Loop = loop, weights: list[Tensor] = weights) -> Tensor:
            named = {f"core.{name}": weight for name, weight in zip(names, weights, strict=True)}
            return torch.func.functional_call(loop, named, (input,))

        kept = run()
        for weight, other in zip(weights, leaves[1], strict=True):
            if change == "written into":
                weight.copy_(other)
            else:
                weight.detach_().requires_grad_()
        run().sin().sum().backward()
        found.append([tensor.grad for tensor in (leaves[1] if change == "written into" else weights)])
        assert not any(leaf.grad is not None and leaf.grad.any() for leaf in leaves[0])
        del kept
    assert_close(found[1], found[0])


def test_weights_that_were_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    loops, input = pair("GRU", dtype=torch.float32), data(3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for loop in loops:
            kept = loop(input.float())
            kept.sum().backward()
            loop.zero_grad()
            loop.double()
            loop(input).sin().sum().backward()
            del kept
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close([w.grad for w in loops[1].parameters()], [w.grad for w in loops[0].parameters()])


@over_kinds
@pytest.mark.parametrize("what", ["written into", "freed"])
def test_what_the_rows_are_must_stay_until_the_end_of_the_pass(kind: str, what: str) -> None:
    """torch.nn has used a step's input when its backward is over. We have not: an error, and no wrong numbers."""
    loop, inputs, state, outputs = pair(kind)[1], [data(1)[0].clone() for _ in range(5)], None, []
    for input in inputs:
        state = loop.core(input, state)
        outputs.append(state[0] if kind == "LSTM" else state)

    def spoil(_: Tensor) -> None:
        if what == "freed":
            inputs[3].untyped_storage().resize_(0)
        else:
            inputs[3].zero_()

    outputs[2].register_hook(spoil)
    with pytest.raises(RuntimeError, match="modified by an inplace operation, or freed, during the backward pass"):
        outputs[-1].sum().backward()


@over_kinds
def test_hooks_of_saved_tensors_lend_them_for_a_moment(kind: str) -> None:
    """An offloader may give out the same buffers again and again: then each step makes the gradients itself."""
    loops, input = pair(kind), data(20).requires_grad_()
    rings: dict[Any, list[Tensor]] = {}

    def unpack(kept: Tensor) -> Tensor:
        ring = rings.setdefault(tuple(kept.shape), [torch.empty_like(kept) for _ in range(16)])
        ring.append(ring.pop(0))
        return ring[-1].copy_(kept)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), unpack):
        outputs = [loop(input) for loop in loops]
    assert ends_in(outputs[1], "WeightGradientsBackward") == 0
    found = [
        torch.autograd.grad(output.sin().sum(), [input, *loop.parameters()])
        for output, loop in zip(outputs, loops, strict=True)
    ]
    assert_close(found[1], found[0])


@over_kinds
@pytest.mark.parametrize("length", [3, 8])
def test_many_rows_are_folded_before_the_end(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.Rows, "MOST", 2 * B * H)
    most: list[int] = []
    add = steps.Rows.add
    monkeypatch.setattr(steps.Rows, "add", lambda self, *rows: (add(self, *rows), most.append(len(self.gates)))[0])
    loops, input = pair(kind), data(length).requires_grad_()
    same(loops, lambda loop: loop(input).sin().sum(), [input])
    assert max(most) <= 2
    for loop in loops:
        first = gradients(lambda loop: loop(input).sin().sum(), loop, create_graph=True)
        sum(grad.square().sum() for grad in first).backward()
    assert_close([w.grad for w in loops[1].parameters()], [w.grad for w in loops[0].parameters()])


COMPILED = """
import torch, rnnfast
from torch._dynamo import compiled_autograd
from torch.testing import assert_close
cell, rows = rnnfast.LSTMCell(5, 7), torch.randn(3, 4, 5)
def loss():
    state = None
    for row in rows: state = cell(row, state)
    return state[0].sin().sum()
expected = torch.autograd.grad(loss(), list(cell.parameters()))
with compiled_autograd._enable(torch.compile(backend="eager")):
    loss().backward()
assert_close([weight.grad for weight in cell.parameters()], list(expected))
print("the same")
"""


def test_compiled_backward_passes() -> None:
    assert "the same" in in_new_process(COMPILED)


class Constant(torch.autograd.Function):
    """The identity, whose gradient is one constant."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ones(B, H, dtype=torch.float64)


@pytest.mark.parametrize("which", [0, 1])
def test_batched_gradients_of_one_state_alone(which: int) -> None:
    loops, input = pair("LSTM"), data(1)[0]
    many, found = torch.randn(4, B, H, dtype=torch.float64), []
    for loop in loops:
        states = list(loop.core(input))
        states[which] = Constant.apply(states[which])
        output = states[0].sin() * states[1].cos() if which else states[0] + states[1]
        found.append(torch.autograd.grad(output, list(loop.parameters()), many, is_grads_batched=True))
    assert_close(found[1], found[0])
