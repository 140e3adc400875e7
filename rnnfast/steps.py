"""One step at a time: cells, and layers called with a single step, as decoders, policies and graph networks do.

Here the calls around the kernels take longer than the kernels, so there is as little Python as can be. `Step` is to
one step what `autograd.Layer` is to sequences.

Where several steps of one graph have the same weights, they put the gradients of the weights off. The backward of such
a step leaves the gradients of its gates with `WeightGradients`, a node of the graph between all of these steps and the
weights. Autograd comes to it when the steps are done, and it makes one product of all their rows. Otherwise there would
be, for each step and each matrix, a product of a few rows that writes a matrix, and a sum that reads two of them, which
takes longer than the rest of a small step. A step to which no other step led does not know whether others will follow,
and makes its own product.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from . import ops
from .autograd import RecurrenceBackward, as_matrix, without_autocast
from .backends import BACKENDS, wants_gradient
from .vmap import is_any_batched

# Bound once: on the path of every call.
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_current_pass = torch._C._current_graph_task_id
_pass_reaches = torch._C._will_engine_execute_node
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# Of a step: (backend, mode, batch_first, weight_ih, weight_hh, bias_ih, bias_hh).
Call = tuple[str, str, bool, Tensor, Tensor, Tensor | None, Tensor | None]
Stepped = tuple[Tensor, Tensor | None, Tensor | None]
SteppedBack = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def has_one_step(input: Tensor, batch_first: bool) -> bool:
    """Whether dense rows, (B, I) or (T, B, I), with batch_first (B, T, I), are one step."""
    shape = input.shape
    return len(shape) == 2 or shape[1 if batch_first else 0] == 1


# --- the kernels --------------------------------------------------------------------------------------------------


def step(
    call: Call, saves: bool, input: Tensor, hx: Tensor | None, cx: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What the op `step` gives (csrc/schemas.h), by any backend: output, h_n, c_n, cell_states, reserve."""
    backend, mode, batch_first, weight_ih, weight_hh, bias_ih, bias_hh = call
    if backend == "cpu":
        results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None] = ops.step(
            mode, saves, input, hx, cx, batch_first, weight_ih, weight_hh, bias_ih, bias_hh
        )
        return results
    kernels = BACKENDS[backend].kernels
    found = (kernels.layer_forward if saves else kernels.layer)(
        mode, input, hx, cx, None, None, None, batch_first, weight_ih, None, weight_hh, None, bias_ih, None, bias_hh,
        None, None, None,
    )  # fmt: skip
    others = [None if tensor.dim() == 1 else tensor for tensor in found[1:]]
    h_n, c_n, cell_states, reserve = others + [None] * (4 - len(others))
    return found[0], h_n, c_n, cell_states, reserve


def step_backward(
    call: Call,
    weight_ih: Tensor,
    weight_hh: Tensor,
    wants_input: bool,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    cell_states: Tensor | None,
    reserve: Tensor | None,
    hx: Tensor | None,
    cx: Tensor | None,
) -> SteppedBack:
    """What the op of that name gives, by any backend: grad_gates, grad_gates_hh, grad_input, grad_hx, grad_cx.

    The two weights as they were saved; the others of `call` as they are.
    """
    backend, mode, batch_first, _, _, bias_ih, bias_hh = call
    differentiable = _grad_enabled() or _functorch_active()
    batched = differentiable or is_any_batched(grad_output, grad_h_n, grad_c_n)
    if backend == "cpu" and not batched and ops.makes_product(input, weight_ih):
        results: SteppedBack = ops.step_backward(
            mode, wants_input, grad_output, grad_h_n, grad_c_n, input, output, cell_states, reserve, hx, cx,
            batch_first, weight_ih, weight_hh,
        )  # fmt: skip
        return results
    with without_autocast(input.device.type):
        nothing = input.new_empty(0)
        arguments = (
            mode, grad_output, grad_h_n, grad_c_n, None, output, nothing if cell_states is None else cell_states,
            nothing if reserve is None else reserve, hx, cx, None, None, None, batch_first, weight_ih, None, weight_hh,
            None, bias_ih, None, bias_hh, None, None, None,
        )  # fmt: skip
        if differentiable:
            gates, recurrent, grad_hx, grad_cx, *_ = RecurrenceBackward.apply(backend, input, *arguments)
        else:
            gates, recurrent, grad_hx, grad_cx, _ = BACKENDS[backend].kernels.recurrence_backward(*arguments)
        grad_input = None
        if wants_input:
            grad_input = ops.matmul(as_matrix(gates), weight_ih).view(input.shape)
    return (
        gates,
        None if recurrent.dim() == 1 else recurrent,
        grad_input,
        None if hx is None else grad_hx,
        None if cx is None else grad_cx,
    )


# --- the gradients of the weights ---------------------------------------------------------------------------------


class Rows:
    """What the steps of one backward pass left, a matrix for each step in each list.

    Attributes:
        gates, inputs: the gradient of W_ih x, (B, G*H), and x, (B, I).
        recurrent, states: the gradient of W_hh h, (B, G*H), and h, (B, H), of the steps that a state entered.
        split: the gradient of W_hh h of every step, of cells where it is not that of W_ih x.
        versions: the sum of those of inputs and states, which are others' tensors. (Versions only grow.)
        elements: in `gates`.
        made: the gradients of the rows that are no longer here.
    """

    __slots__ = (
        "__weakref__", "elements", "gates", "inputs", "made", "recurrent", "split", "states", "versions",
    )  # fmt: skip

    # So many elements of gates are worth a product of their own: what is left of them is not kept any longer.
    MOST = 1 << 22

    def __init__(self) -> None:
        self.made: list[Tensor | None] | None = None
        self.clear()

    def clear(self) -> None:
        self.gates: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.recurrent: list[Tensor] = []
        self.states: list[Tensor] = []
        self.split: list[Tensor] = []
        self.versions = 0
        self.elements = 0

    def add(self, gates: Tensor, split: Tensor | None, input: Tensor, state: Tensor | None) -> None:
        self.gates.append(gates)
        self.elements += gates.numel()
        self.inputs.append(input)
        self.versions += input._version
        if split is not None:
            self.split.append(split)
        if state is not None:
            self.recurrent.append(gates if split is None else split)
            self.states.append(state)
            self.versions += state._version

    def _check(self) -> None:
        """Between a step's backward and this, others may have written into its input or state, or freed them."""
        tensors = [*self.inputs, *self.states]
        changed = sum(tensor._version for tensor in tensors) != self.versions
        if changed or any(tensor.untyped_storage().size() == 0 and tensor.numel() for tensor in tensors):
            raise RuntimeError(
                "rnnfast: the input or the state of a step has been modified by an inplace operation, or freed, during "
                "the backward pass: the gradients of the weights are made of them when the pass has done with all steps"
            )

    def fold(self, weight_hh: Tensor, needs: Sequence[bool]) -> None:
        """The rows' gradients in place of the rows."""
        self.made = self.gradients(weight_hh, needs)
        self.clear()

    def gradients(self, weight_hh: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of weight_ih, weight_hh, bias_ih and bias_hh, of those that are needed. Nothing that is handed out
        shares memory: callers write into gradients.

        Raises:
            RuntimeError: the input or state of a step is not what it was when the step left it.
        """
        if not self.gates and self.made is not None:
            return self.made
        self._check()
        grads: list[Tensor | None] = [None] * 4
        of_input, of_recurrent, of_bias_ih, of_bias_hh = needs
        gates = _joined(self.gates)
        if of_input:
            grads[0] = ops.matmul(gates.t(), _joined(self.inputs))
        if of_recurrent and not self.states:
            grads[1] = torch.zeros_like(weight_hh)
        elif of_recurrent:
            all_alike = not self.split and len(self.states) == len(self.gates)
            recurrent = gates if all_alike else _joined(self.recurrent)
            grads[1] = ops.matmul(recurrent.t(), _joined(self.states))
        if of_bias_ih or of_bias_hh:
            sums = gates.sum(0)
            if of_bias_hh:
                grads[3] = _joined(self.split).sum(0) if self.split else sums.clone() if of_bias_ih else sums
            if of_bias_ih:
                grads[2] = sums
        if self.made is None:
            return grads
        return [a if b is None else b if a is None else a + b for a, b in zip(self.made, grads, strict=True)]

    def __call__(self) -> None:
        """What autograd calls at the end of the pass. Until then, or until the pass fails, it keeps the rows alive."""


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def origins_of(weights: Sequence[Tensor | None]) -> list[Any]:
    """Where in autograd's graph the weights come from: None of those that came from nowhere."""
    return [None if weight is None else weight.grad_fn for weight in weights]


class WeightGradients(torch.autograd.Function):
    """The node between steps and their weights, (weight_ih, weight_hh, bias_ih, bias_hh). Its result, of no elements,
    stands for the weights where a step takes it."""

    @staticmethod
    def forward(ctx: Any, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight_hh = weight_hh
        ctx.origins = origins_of((weight_ih, weight_hh, *biases))
        # Of each pass in which a step has left rows, by the number that autograd gives it: where they are.
        ctx.passes = {}
        return weight_ih.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        where = ctx.passes.pop(_current_pass(), None)
        rows: Rows | None = None if where is None else where()
        if rows is None:
            return (None,) * 4
        with without_autocast(ctx.weight_hh.device.type):
            grads = rows.gradients(ctx.weight_hh, ctx.needs_input_grad)
        rows.clear()
        rows.made = None
        return tuple(grads)


def _rows_of_this_pass(node: Any) -> Rows | None:
    """Where a step leaves its rows; None where this pass does not come to the weights."""
    number, passes = _current_pass(), node.passes
    where = passes.get(number)
    if where is not None:
        rows: Rows = where()
        return rows
    if not _pass_reaches(node):
        return None
    # Those that failed before they came to the weights.
    for other in [other for other, where in list(passes.items()) if where() is None]:
        passes.pop(other, None)
    rows = Rows()
    Variable._execution_engine.queue_callback(rows)  # type: ignore[no-untyped-call]
    passes[number] = weakref.ref(rows)
    return rows


# --- autograd -----------------------------------------------------------------------------------------------------


# Which tensors a step has kept, beside its input and weight_hh, in this order.
_HAS_WEIGHT_IH, _HAS_OUTPUT, _HAS_CELL_STATES, _HAS_RESERVE, _HAS_HX, _HAS_CX = [1 << i for i in range(6)]
# Gradients of what has none, by their number: of token and call, and the weights where they are arguments.
_UNSEEN = {number: (None,) * number for number in (2, 6)}


class Step(torch.autograd.Function):
    """One step of one layer with one direction: (output, h_n, c_n), of which h_n is None where rows are (B, I), and c_n
    where the cell has no cell state.

    Args:
        input: (B, I), or as a sequence (1, B, I), with batch_first (B, 1, I).
        hx, cx: (B, H), of a sequence (1, B, H); None for zeros.
        token: from `WeightGradients`, which then makes the gradients of the weights. None: the step makes them.
        call: the rest.
        weights: the four of `call` again, where there is no token: so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        token: Tensor | None,
        call: Call,
        *weights: Tensor | None,
    ) -> Stepped:
        output, h_n, c_n, cell_states, reserve = step(call, True, input, hx, cx)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.token = token
        # What the first derivative needs. (A None among saved tensors breaks tools that look at them.)
        needs_weight_ih = ctx.needs_input_grad[0]
        saved, has = [input, call[4]], 0
        if needs_weight_ih:
            has |= _HAS_WEIGHT_IH
            saved.append(call[3])
        # Whoever called may write into a cell's new state, unless the cell saves nothing else.
        if reserve is None or h_n is not None:
            has |= _HAS_OUTPUT
            saved.append(output)
        if cell_states is not None:
            has |= _HAS_CELL_STATES
            saved.append(cell_states)
        if reserve is not None:
            has |= _HAS_RESERVE
            saved.append(reserve)
        if hx is not None:
            has |= _HAS_HX
            saved.append(hx)
        if cx is not None:
            has |= _HAS_CX
            saved.append(cx)
        ctx.save_for_backward(*saved)
        ctx.has = has
        # The rest may change meanwhile; the second derivative looks whether it did.
        ctx.versions = tuple(
            [
                None if tensor is None else tensor._version
                for tensor in (None if needs_weight_ih else call[3], call[5], call[6])
            ]
        )
        return output, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        unseen = _UNSEEN[len(needs) - 3]
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            return None, None, None, *unseen
        call, has = ctx.call, ctx.has
        following = iter(ctx.saved_tensors).__next__
        input, weight_hh = following(), following()
        weight_ih = following() if has & _HAS_WEIGHT_IH else call[3]
        output = following() if has & _HAS_OUTPUT else None
        cell_states = following() if has & _HAS_CELL_STATES else None
        reserve = following() if has & _HAS_RESERVE else None
        hx = following() if has & _HAS_HX else None
        cx = following() if has & _HAS_CX else None
        if _grad_enabled():
            _check_versions(ctx)
        gates, split, grad_input, grad_hx, grad_cx = step_backward(
            call, weight_ih, weight_hh, needs[0], grad_output, grad_h_n, grad_c_n, input, output, cell_states, reserve,
            hx, cx,
        )  # fmt: skip
        token = ctx.token
        rows = Rows() if token is None else _rows_of_this_pass(token.grad_fn)
        if rows is None or (token is None and True not in needs[5:]):
            return grad_input, grad_hx, grad_cx, *unseen
        if gates.dim() == 3:
            gates, input = as_matrix(gates), as_matrix(input)
            split = None if split is None else as_matrix(split)
            hx = None if hx is None else as_matrix(hx)
        rows.add(gates, split, input, hx)
        if token is not None:
            if rows.elements >= Rows.MOST:
                with without_autocast(input.device.type):
                    rows.fold(weight_hh, token.grad_fn.needs_input_grad)
            return grad_input, grad_hx, grad_cx, None, None
        with without_autocast(input.device.type):
            return grad_input, grad_hx, grad_cx, None, None, *rows.gradients(weight_hh, needs[5:])


def _check_versions(ctx: Any) -> None:
    """What was not saved must be as it was: the second derivative needs it."""
    weight_ih, _, bias_ih, bias_hh = ctx.call[3:]
    unsaved = {"weight_ih": weight_ih, "bias_ih": bias_ih, "bias_hh": bias_hh}
    for (name, tensor), version in zip(unsaved.items(), ctx.versions, strict=True):
        if version is not None and tensor._version != version:
            raise RuntimeError(
                f"rnnfast: {name} has been modified by an inplace operation since the forward pass, and the second "
                f"derivative needs it as it was: expected version {version}, got {tensor._version}"
            )


# What `apply` comes to: see `autograd.apply_layer`.
_apply_step: Any = super(torch.autograd.Function, Step).apply  # type: ignore[misc]
_defer: Any = super(torch.autograd.Function, WeightGradients).apply  # type: ignore[misc]

# A step of every graph that is alive, by its weights: what the next one with these weights knows of those before it.
_alive: dict[tuple[Any, ...], weakref.ref[Any]] = {}


def _remember(key: tuple[Any, ...], node: Any) -> None:
    def forget(gone: weakref.ref[Any]) -> None:
        if _alive.get(key) is gone:
            _alive.pop(key, None)

    _alive[key] = weakref.ref(node, forget)


def _autograd_is_compiled() -> bool:
    """Whether backward passes are compiled, which come to each node once, when the graph is made of them."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled is not None and bool(compiled.compiled_autograd_enabled)


def _is_worth_deferring(input: Tensor, weight_hh: Tensor) -> bool:
    """Whether to keep a step's rows, and to read them again later, takes less than a product of their own. Measured."""
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    return rows <= 64 or 4 * rows <= weight_hh.shape[1]


def run_step(call: Call, input: Tensor, hx: Tensor | None, cx: Tensor | None) -> Stepped:
    """One step in a plain call: `Step`'s results, with a derivative where anything wants a gradient."""
    _, _, _, weight_ih, weight_hh, bias_ih, bias_hh = call
    if not _grad_enabled():
        return step(call, False, input, hx, cx)[:3]
    wanted = (
        weight_ih.requires_grad,
        weight_hh.requires_grad,
        bias_ih is not None and bias_ih.requires_grad,
        bias_hh is not None and bias_hh.requires_grad,
    )
    if True not in wanted:
        if not wants_gradient(input, (hx, cx)):
            return step(call, False, input, hx, cx)[:3]
        results: Stepped = _apply_step(input, hx, cx, None, call)
        return results
    # While a step of that graph is alive, so are its weights: these numbers are no others'. (Not id(): what a Python
    # object stands for can be swapped.)
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    key = (*[None if weight is None else weight._cdata for weight in weights], wanted, input.dtype)
    where = _alive.get(key)
    earlier = None if where is None else where()
    token = None if earlier is None else earlier.token
    if token is not None and token.grad_fn.origins != origins_of(weights):
        # Others were written into them, with a graph of their own.
        token = None
    in_loop = earlier is not None or (hx is not None and hx.grad_fn is not None)
    in_loop = in_loop and _is_worth_deferring(input, weight_hh)
    # Whoever keeps saved tensors elsewhere lends them to a step's backward alone.
    if token is None and in_loop and _saved_tensors_hooks(False) is None and not _autograd_is_compiled():
        token, earlier = _defer(*weights), None
    if token is None:
        results = _apply_step(input, hx, cx, None, call, *weights)
    else:
        results = _apply_step(input, hx, cx, token, call)
    if earlier is None:
        _remember(key, results[0].grad_fn)
    return results
