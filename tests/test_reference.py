"""The reference is the truth for every kernel; here it is held to torch.nn, to gradcheck, and to itself."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cases import MODES, TORCH_MODES, WITH_CELL_STATE, Call, make_call, random_grads, reference, torch_layer
from rnnfast import reference as plain
from rnnfast.cell_types import CELLS
from tolerances import check_equal

LAYOUTS = {
    "dense": {},
    "batch_first": {"layout": "batch_first"},
    "packed": {"layout": "packed"},
    "lengths": {"lengths": True},
    "resets": {"resets": True, "layout": "batch_first"},
    "lengths+resets": {"lengths": True, "resets": True},
}
PROJECTED = [(mode, P) for mode in MODES for P in (0, 2) if not P or CELLS[mode].may_project]


def gradients(results: dict[str, Tensor], grads: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = list(grads)
    values = torch.autograd.grad(
        [results[n] for n in names], list(inputs.values()), [grads[n] for n in names], materialize_grads=True
    )
    return dict(zip(inputs, values, strict=True))


def states(call: Call) -> Tensor | tuple[Tensor, Tensor] | None:
    """hx as torch.nn takes it."""
    return call.hx if call.mode not in WITH_CELL_STATE or call.hx is None else (call.hx, call.cx)


def results_of(output: Tensor, state: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    h_n, c_n = state if isinstance(state, tuple) else (state, None)
    return {"output": output, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})


def compare(call: Call, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Results and the gradients of all inputs under the same random gradients."""
    for name, value in expected.items():
        check_equal(name, actual[name], value)
    grads = random_grads(expected)
    ours, theirs = (gradients(r, grads, call.tensors()) for r in (actual, expected))
    for name in ours:
        check_equal("gradient of " + name, ours[name], theirs[name])


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "P"), [case for case in PROJECTED if case[0] in TORCH_MODES])
def test_against_torch_nn(mode: str, P: int, bias: bool, D: int, layout: str, initial: bool) -> None:
    call = make_call(mode, P=P, D=D, bias=bias, layout=layout, initial=initial).leaves()
    input = PackedSequence(call.input, call.batch_sizes) if layout == "packed" else call.input
    output, state = torch_layer(call, list(range(D)))(input, states(call))
    output = output.data if layout == "packed" else output
    compare(call, call.forward(reference), results_of(output, state))


@pytest.mark.parametrize("D", [1, 2])
def test_identity_is_the_linear_recurrence(D: int) -> None:
    call = make_call("RNN_IDENTITY", D=D).leaves()
    every_h, h_n = [], []
    for d in range(D):
        h, outputs = call.hx[d], {}
        for t in range(call.steps) if d == 0 else reversed(range(call.steps)):
            h = call.input[t] @ call.weight_ih[d].T + call.bias_ih[d] + h @ call.weight_hh[d].T + call.bias_hh[d]
            outputs[t] = h
        every_h.append(torch.stack([outputs[t] for t in range(call.steps)]))
        h_n.append(h)
    compare(call, call.forward(reference), {"output": torch.cat(every_h, dim=-1), "h_n": torch.stack(h_n)})


def segments(call: Call, b: int, d: int) -> list[tuple[int, int, bool]]:
    """Row b cut at its resets, in the order direction d takes the pieces: (start, end, takes the initial state)."""
    length = int(call.alive()[:, b].sum())
    cuts = [t for t in range(1, length) if call.boundaries()[t, b]]
    pieces = list(zip([0, *cuts], [*cuts, length], strict=True)) if length else []
    if d == 1:
        pieces.reverse()
        return [(start, end, k == 0) for k, (start, end) in enumerate(pieces)]
    return [(start, end, start == 0 and not bool(call.boundaries()[0, b])) for start, end in pieces]


@pytest.mark.parametrize("layout", ["resets", "lengths", "lengths+resets"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("mode", "P"), [case for case in PROJECTED if case[0] in TORCH_MODES])
def test_resets_and_lengths_against_torch_nn_on_the_pieces(mode: str, P: int, D: int, layout: str) -> None:
    """Each row is cut into its segments; torch.nn runs on each of them alone, forwards or flipped."""
    call = make_call(mode, P=P, D=D, T=7, B=5, **LAYOUTS[layout]).leaves()
    input = call.rows_to_dense(call.input)
    layers = [torch_layer(dataclasses.replace(call, batch_first=False), [d]) for d in range(D)]
    rows, last_h, last_c = [], [], []
    for d in range(D):
        outputs = []
        for b in range(call.batch):
            h, c = call.hx[d, b], call.cx[d, b] if mode in WITH_CELL_STATE else None
            output = [input.new_zeros(0, h.shape[0])]
            for start, end, initial in segments(call, b, d):
                h, c = (h, c) if initial else (torch.zeros_like(h), None if c is None else torch.zeros_like(c))
                piece = input[start:end, b : b + 1]
                piece = piece.flip(0) if d == 1 else piece
                state = h[None, None] if c is None else (h[None, None], c[None, None])
                piece, state = layers[d](piece, state)
                h, c = (state[0][0, 0], state[1][0, 0]) if mode in WITH_CELL_STATE else (state[0, 0], None)
                piece = piece[:, 0]
                output = [piece.flip(0), *output] if d == 1 else [*output, piece]
            length = sum(len(piece) for piece in output)
            outputs.append(torch.cat([*output, input.new_zeros(call.steps - length, h.shape[0])]))
            last_h.append(h)
            last_c.append(c)
        rows.append(torch.stack(outputs, dim=1))
    output = torch.cat(rows, dim=-1)
    expected = {
        "output": output.transpose(0, 1) if call.batch_first else output,
        "h_n": torch.stack(last_h).unflatten(0, (D, call.batch)),
    }
    if mode in WITH_CELL_STATE:
        expected["c_n"] = torch.stack(last_c).unflatten(0, (D, call.batch))
    compare(call, call.forward(reference), expected)


@pytest.mark.parametrize(("mode", "P"), [case for case in PROJECTED if case[0] in TORCH_MODES])
def test_lengths_against_packing(mode: str, P: int) -> None:
    call = make_call(mode, P=P, D=2, lengths=True)
    call.lengths.clamp_(min=1)
    call = call.leaves()
    packed = pack_padded_sequence(call.input, call.lengths, enforce_sorted=False)
    output, state = torch_layer(call, [0, 1])(packed, states(call))
    output, _ = pad_packed_sequence(output, total_length=call.steps)
    compare(call, call.forward(reference), results_of(output, state))


@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_rows_of_length_zero_are_as_if_absent(mode: str, P: int) -> None:
    call = make_call(mode, P=P, D=2, B=6, lengths=True).leaves()
    call.lengths[1] = 0
    results = call.forward(reference)
    there = call.lengths > 0
    without = dataclasses.replace(
        call,
        input=call.input[:, there],
        lengths=call.lengths[there],
        hx=call.hx[:, there],
        cx=call.cx[:, there] if mode in WITH_CELL_STATE else None,
    )
    expected = without.forward(reference)
    for name in ["output", "h_n", "c_n", "cell_states"]:
        if expected[name].numel():
            check_equal(name, results[name][:, there], expected[name])
    assert torch.equal(results["h_n"][:, ~there], call.hx[:, ~there])
    assert not results["output"][:, ~there].any()
    if mode in WITH_CELL_STATE:
        assert torch.equal(results["c_n"][:, ~there], call.cx[:, ~there])


@pytest.mark.parametrize("layout", ["packed", "lengths+resets"])
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_gradcheck_and_gradgradcheck(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, T=3, B=2, I=2, H=3, P=P, D=2, **LAYOUTS[layout]).leaves()
    if mode == "RNN_RELU":
        # finite differences must not step over the kink, which these seeds and this shift stay clear of
        call = call.map(lambda value: (value.detach() + 0.05).requires_grad_())
    wanted = [
        name for name in ["output", "h_n", "c_n", "cell_states"] if mode in WITH_CELL_STATE or name in ("output", "h_n")
    ]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        results = call.with_tensors(list(values)).forward(reference)
        return tuple(results[name] for name in wanted)

    inputs = tuple(call.tensors().values())
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=True)


def states_before(call: Call, initial: Tensor | None, states: Tensor) -> Tensor:
    """The state that each step starts from, (T, B, D*F). Written with loops over rows, to be independent."""
    size = states.shape[-1] // call.directions
    dense, alive, boundary = call.rows_to_dense(states), call.alive(), call.boundaries()
    before = torch.zeros_like(dense)
    for d in range(call.directions):
        part = slice(d * size, (d + 1) * size)
        for b in range(call.batch):
            length = int(alive[:, b].sum())
            for t in range(length):
                previous, first, cut = (
                    (t - 1, t == 0, boundary[t, b])
                    if d == 0
                    else (t + 1, t == length - 1, t + 1 < length and boundary[t + 1, b])
                )
                if cut:
                    continue
                if not first:
                    before[t, b, part] = dense[previous, b, part]
                elif initial is not None:
                    before[t, b, part] = initial[d, b]
    return before


def all_gradients(call: Call, grads: dict[str, Tensor | None], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient from the hand-written backward pass, the weights' by the products it is made for."""
    D = call.directions
    result = call.backward(reference, grads, saved)
    gates = call.rows_to_dense(result["grad_gates"]).unflatten(-1, (D, -1))
    gates_hh = call.rows_to_dense(
        result["grad_gates_hh"] if CELLS[call.mode].split_gate is not None else result["grad_gates"]
    )
    gates_hh = gates_hh.unflatten(-1, (D, -1))
    input = call.rows_to_dense(call.input)
    before = states_before(call, call.hx, saved["output"]).unflatten(-1, (D, -1))
    named = {}
    dinput = sum(gates[..., d, :] @ call.weight_ih[d] for d in range(D))
    if call.batch_sizes is not None:
        dinput = dinput[call.alive()]
    named["input"] = dinput.transpose(0, 1) if call.batch_first else dinput
    named |= {f"weight_ih[{d}]": torch.einsum("tbg,tbi->gi", gates[..., d, :], input) for d in range(D)}
    named |= {f"weight_hh[{d}]": torch.einsum("tbg,tbh->gh", gates_hh[..., d, :], before[..., d, :]) for d in range(D)}
    if call.bias_ih:
        named |= {f"bias_ih[{d}]": gates[..., d, :].sum((0, 1)) for d in range(D)}
        named |= {f"bias_hh[{d}]": gates_hh[..., d, :].sum((0, 1)) for d in range(D)}
    if call.weight_hr:
        projected = call.rows_to_dense(result["grad_projected"]).unflatten(-1, (D, -1))
        o = call.rows_to_dense(saved["reserve"]).unflatten(-1, (D, 4, -1))[..., 3, :]
        hidden = o * call.rows_to_dense(saved["cell_states"]).unflatten(-1, (D, -1)).tanh()
        named |= {
            f"weight_hr[{d}]": torch.einsum("tbp,tbh->ph", projected[..., d, :], hidden[..., d, :]) for d in range(D)
        }
    if call.hx is not None:
        named["hx"] = result["grad_hx"]
    if call.cx is not None:
        named["cx"] = result["grad_cx"]
    return named


@pytest.mark.parametrize(
    "given", [["output"], ["h_n"], ["c_n"], ["cell_states"], ["output", "h_n", "c_n", "cell_states"]]
)
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_hand_written_backward_against_autograd(
    mode: str, P: int, layout: str, initial: bool, given: list[str]
) -> None:
    """Every gradient, from each of the results alone (the others None) and from all of them."""
    if mode not in WITH_CELL_STATE:
        given = [name for name in given if name in ("output", "h_n")]
    call = make_call(mode, P=P, D=2, initial=initial, **LAYOUTS[layout]).leaves()
    results = call.forward(reference)
    grads = random_grads(results, given)
    saved = {name: value.detach() for name, value in results.items()}
    actual = all_gradients(call.map(Tensor.detach), grads, saved)
    if not given:
        assert not any(value.any() for value in actual.values())
        return
    for name, value in gradients(results, grads, call.tensors()).items():
        check_equal("gradient of " + name, actual[name], value)


@pytest.mark.parametrize("layout", ["packed", "lengths+resets"])
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_hand_written_backward_is_differentiable(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, T=3, B=2, I=2, H=3, P=P, D=2, **LAYOUTS[layout])
    results = call.forward(reference)
    saved = {name: results[name] for name in ["output", "cell_states", "reserve"] if results[name].numel()}
    if mode == "RNN_RELU":
        # an output of zero is on the kink
        saved["output"] = torch.where(saved["output"] == 0, -1, saved["output"])
    grads = random_grads(results)
    nothing = results["output"].new_empty(0)

    def backward(*values: Tensor) -> tuple[Tensor, ...]:
        mine = dict(zip(grads, values, strict=False))
        whole = {"cell_states": nothing, "reserve": nothing} | dict(zip(saved, values[len(grads) :], strict=False))
        changed = call.with_tensors(list(values[len(grads) + len(saved) :]))
        return tuple(value for value in changed.backward(reference, mine, whole).values() if value.numel())

    values = [*grads.values(), *saved.values(), *call.tensors().values()]
    assert torch.autograd.gradcheck(backward, [value.clone().requires_grad_() for value in values], fast_mode=True)


@pytest.mark.parametrize("layout", ["packed", "lengths+resets"])
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_transforms(mode: str, P: int, layout: str) -> None:
    """vmap over inputs and over weights, vmap(grad), jvp."""
    call = make_call(mode, T=3, B=2, H=3, P=P, D=2, **LAYOUTS[layout])
    calls = [call.map(lambda value, k=k: value + 0.1 * k) for k in range(3)]
    names = [name for name in ["output", "h_n", "c_n", "cell_states"] if call.forward(reference)[name].numel()]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        results = call.with_tensors(list(values)).forward(reference)
        return tuple(results[name] for name in names)

    def loss(*values: Tensor) -> Tensor:
        return sum(result.sin().sum() for result in forward(*values))

    leaves = list(call.tensors().values())
    gradients_of = torch.func.grad(loss, argnums=tuple(range(len(leaves))))
    stacked = [torch.stack(values) for values in zip(*(list(c.tensors().values()) for c in calls), strict=True)]
    states_and_input = [name in ("input", "hx", "cx") for name in call.tensors()]
    for batched in ([True] * len(leaves), states_and_input, [not inner for inner in states_and_input]):
        values = [s if b else leaf for s, b, leaf in zip(stacked, batched, leaves, strict=True)]
        in_dims = tuple(0 if b else None for b in batched)
        for function in (forward, gradients_of):
            alone = [function(*(v[k] if b else v for v, b in zip(values, batched, strict=True))) for k in range(3)]
            results = torch.vmap(function, in_dims)(*values)
            for result, expected in zip(results, zip(*alone, strict=True), strict=True):
                check_equal("vmap", result, torch.stack(expected))
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    _, derivative = torch.func.jvp(loss, tuple(leaves), tuple(tangents))
    products = [(g * t).sum() for g, t in zip(gradients_of(*leaves), tangents, strict=True)]
    check_equal("jvp", derivative, sum(products), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_sixteen_bit_types_round_h_each_step_and_carry_c_in_float32(mode: str, P: int, dtype: torch.dtype) -> None:
    call = make_call(mode, P=P, dtype=dtype)
    results = call.forward(reference)
    assert all(value.dtype == dtype for value in results.values())
    single = call.to(torch.float32)
    # Rounded once, as a product into that type is.
    gates = plain.input_projection(mode, call.input, call.record.parameters).float()
    for t in range(call.steps):
        _, h_n, c_n, *_ = plain.recurrence_forward(gates[t : t + 1], single.record)
        single.hx = h_n.to(dtype).float()
        single.cx = c_n if mode in WITH_CELL_STATE else None
        assert torch.equal(results["output"][t], single.hx[0].to(dtype))
    assert torch.equal(results["h_n"], single.hx.to(dtype))
    if mode in WITH_CELL_STATE:
        assert torch.equal(results["c_n"], single.cx.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", TORCH_MODES)
def test_nan_and_inf_propagate_as_in_torch_nn(mode: str, value: float) -> None:
    call = make_call(mode, D=2)
    call.input[2, 1, 0] = value
    call = call.leaves()
    expected = results_of(*torch_layer(call, [0, 1])(call.input, states(call)))
    compare(call, call.forward(reference), expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_lies_beyond_a_row_is_never_read(mode: str) -> None:
    call = make_call(mode, D=2, lengths=True, resets=True)
    results = call.forward(reference)
    grads = random_grads(results)
    expected = call.backward(reference, grads, results)
    beyond = ~call.alive_rows()
    call.input[beyond] = float("nan")
    poisoned = {name: value.clone() for name, value in results.items()}
    grads = {name: value.clone() for name, value in grads.items()}
    for tensors in (poisoned, grads):
        for name in {"output", "cell_states", "reserve"} & set(tensors):
            if tensors[name].numel():
                tensors[name][beyond] = float("nan")
    again = call.forward(reference)
    for name in ["output", "h_n", "c_n", "cell_states"]:
        assert torch.equal(again[name], results[name])
    actual = call.backward(reference, grads, poisoned)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        if value.numel() and name not in ("grad_hx", "grad_cx"):
            assert not value[beyond].any(), name


def test_relu_has_no_slope_at_zero() -> None:
    call = make_call("RNN_RELU", bias=False, initial=False)
    call.input.zero_()
    results = call.forward(reference)
    grads = {"output": torch.ones_like(results["output"])}
    assert not call.backward(reference, grads, results)["grad_gates"].any()


@pytest.mark.parametrize("mode", MODES)
def test_inference_and_results_that_do_not_apply(mode: str) -> None:
    call = make_call(mode, D=2, initial=False)
    results = call.forward(reference)
    for name, value in call.inference(reference).items():
        assert torch.equal(value, results[name])
    none = torch.Size([0])
    assert (results["c_n"].shape == none) == (results["cell_states"].shape == none) == (mode not in WITH_CELL_STATE)
    assert (results["reserve"].shape == none) == (CELLS[mode].reserve == 0)
    actual = call.backward(reference, random_grads(results), results)
    applies = {"grad_gates"} | ({"grad_gates_hh"} if CELLS[mode].split_gate is not None else set())
    assert {name for name, value in actual.items() if value.shape != none} == applies


@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize(("mode", "P"), PROJECTED)
def test_no_rows(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, B=0, layout=layout, lengths=True, resets=True)
    results = call.forward(reference)
    assert results["h_n"].shape == (2, 0, P or 5)
    assert results["output"].shape == call.input.shape[:2] + (2 * (P or 5),)
    actual = call.backward(reference, random_grads(results), results)
    assert actual["grad_hx"].shape == call.hx.shape


def test_unknown_mode_is_named() -> None:
    call = make_call("GRU")
    call.mode = "QRNN"
    with pytest.raises(ValueError, match=f"mode must be one of {', '.join(MODES)}, got 'QRNN'"):
        call.inference(reference)
