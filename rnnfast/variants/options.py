"""The options of a layer beyond torch.nn's: their names, values, checks, and the parameters that they bring.

A new option is a field of `Options`, a line in `_check`, and what reference.py (and the kernels) make of it;
docs/design.md has the files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from typing import Any, ClassVar

from torch import Tensor, nn

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "layer_norm": (None, "separate", "joint"),
    "cell_norm": (None, "output", "carried"),
    "norm": ("layer", "rms"),
    "dropout_mode": ("state", "candidate"),
    "gate_activation": ("sigmoid", "hard_sigmoid"),
    "batch_norm": (None, "sequence", "recurrent"),
    "candidate_activation": ("tanh", "relu"),
    "preset": (None, "dreamer_v3", "light_gru"),
}
# By preset: how many gates its cell has, and what it stands for.
_PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "dreamer_v3": (3, {"layer_norm": "joint", "norm": "layer", "norm_eps": 1e-3}),
    "light_gru": (3, {"reset_gate": False, "candidate_activation": "relu", "batch_norm": "sequence"}),
}
_PROBABILITIES = ("recurrent_dropout", "input_dropout", "weight_dropout")
# What only a cell with a cell state has, or with gates.
_NEEDS_CELL_STATE = ("cell_norm", "peephole", "coupled", "forget_bias")
_NEEDS_GATES = ("gate_activation", "dropout_mode")
_NEEDS_RESET = ("reset_after", "reset_gate", "candidate_activation")


@dataclasses.dataclass(frozen=True)
class Options:
    r"""What a layer does beside torch.nn's equations: keyword arguments of LSTM, GRU, RNN and, but for dropout and
    batch norm, of their cells. The defaults change nothing. With N the norm, :math:`x = W_{ih} x_t` and
    :math:`u = W_{hh} h_{t-1}`:

    Attributes:
        layer_norm: of the gates, over all G*H of a row: ``"separate"``, :math:`N(x) + N(u) + b_{ih} + b_{hh}` (Ba et
            al. 2016, https://arxiv.org/abs/1607.06450), or ``"joint"``, :math:`N(x + u + b_{ih} + b_{hh})`. Of the
            GRU's n: separate, :math:`\tanh(N(x)_n + b_{in} + r \odot (N(u)_n + b_{hn}))`, joint, :math:`\tanh(r \odot
            N(\cdot)_n)`. Parameters: ``weight_norm_ih, weight_norm_hh`` (G*H), whose biases are the layer's own, or
            ``weight_norm, bias_norm`` (G*H).
        cell_norm: of the LSTM's cell state: ``"output"``, :math:`h_t = o \odot \tanh(N(c_t))` alone, or ``"carried"``,
            :math:`c_t := N(f \odot c_{t-1} + i \odot g)`. Parameters: ``weight_norm_c, bias_norm_c`` (H).
            ``"separate"`` and ``"output"`` is haste's LayerNormLSTM; ``"separate"`` and ``"carried"`` is the
            LayerNormLSTM of PyTorch's own fastrnns benchmark, which NeMo's ``ln_lstm`` is; ``"joint"`` and
            ``"carried"`` with ``bias=False`` is that of torchaudio's RNN-T predictor.
        norm: what N is: ``"layer"`` as torch.nn.LayerNorm, ``"rms"`` as torch.nn.RMSNorm, which has no bias (Zhang and
            Sennrich 2019, https://arxiv.org/abs/1910.07467).
        norm_eps: added to the variance, or the mean square; of batch_norm too.
        batch_norm: ``"sequence"``, of x over all rows and steps that count (Laurent et al. 2016,
            https://arxiv.org/abs/1510.01378; Deep Speech 2), or ``"recurrent"``, of x, of u and of what the LSTM's tanh
            sees of c, with statistics of each step (Cooijmans et al. 2017, https://arxiv.org/abs/1603.09025), through
            the reference alone. Parameters ``weight_batch_norm_ih`` (G*H) and with ``"recurrent"``
            ``weight_batch_norm_hh`` (G*H), ``weight_batch_norm_c, bias_batch_norm_c`` (H); buffers ``running_mean_ih``,
            ``running_var_ih`` and so on.
        batch_norm_momentum: the part of a batch in the running statistics.
        batch_norm_steps: with ``"recurrent"``: how many steps have statistics of their own; later ones share the last.
            Steps are counted as a direction takes them.
        zoneout: probabilities (of h, of c) that a unit keeps its state; one number is of both. In evaluation the state
            is the expectation. o and the new h look at c as it is before (Krueger et al. 2017,
            https://arxiv.org/abs/1606.01305).
        recurrent_dropout: probability, with one mask for each sequence and direction.
        dropout_mode: what that mask multiplies: ``"state"``, h in :math:`W_{hh} h` (Gal and Ghahramani 2016,
            https://arxiv.org/abs/1512.05287), or ``"candidate"``, g of the LSTM or n of the GRU (Semeniuta et al. 2016,
            https://arxiv.org/abs/1603.05118).
        input_dropout: probability, of every layer's input features, one mask for each sequence (Gal and Ghahramani).
        weight_dropout: probability, of the elements of :math:`W_{hh}`, drawn once a call (Merity et al. 2018,
            https://arxiv.org/abs/1708.02182).
        peephole: i and f see :math:`c_{t-1}`, o sees :math:`c_t` (Gers and Schmidhuber 2000), behind a norm of the
            gates. With ``cell_norm="carried"`` that is the normalised c, with ``"output"`` the other. Parameter:
            ``weight_peephole`` (3H), of i, f, o, coupled (2H).
        coupled: whether :math:`f = 1 - i`, without weights of its own: gates i, g, o (Greff et al. 2017,
            https://arxiv.org/abs/1503.04069, "CIFG").
        reset_after: of the GRU: whether r multiplies :math:`W_{hn} h + b_{hn}`, as in torch.nn, or (False) h itself,
            :math:`W_{hn} (r \odot h) + b_{hn}` (Cho et al. 2014, https://arxiv.org/abs/1406.1078; Keras'
            ``reset_after=False``, ONNX's ``linear_before_reset=0``).
        reset_gate: of the GRU: whether there is r; without it, z and n are all (Ravanelli et al. 2018,
            https://arxiv.org/abs/1803.10225).
        candidate_activation: of the GRU's n: ``"tanh"`` or ``"relu"``.
        num_heads: :math:`W_{hh}` has so many blocks on its diagonal, and nothing beside them: ``weight_hh`` is
            (G*H, H / num_heads), whose row g*H + u holds the weights of unit u in gate g with the units of its own
            head (Pöppel et al. 2024, https://arxiv.org/abs/2412.07752).
        gate_activation: of the gates: ``"sigmoid"`` or ``"hard_sigmoid"``, clip(0.2 x + 0.5, 0, 1). (``"exponential"``
            makes an sLSTM, which is a class of its own.)
        preset: a published layer by its name, in the place of options: ``"dreamer_v3"``, the GRU of DreamerV3
            (https://arxiv.org/abs/2301.04104: joint norm, reset * candidate, update - 1; there it has ``bias=False``),
            or ``"light_gru"``, see :class:`rnnfast.LiGRU`.
        forget_bias: what the sum of the forget gate's biases starts with, behind a joint norm its part of
            ``bias_norm``; None: as torch.nn.
    """

    layer_norm: str | None = None
    cell_norm: str | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    batch_norm: str | None = None
    batch_norm_momentum: float = 0.1
    batch_norm_steps: int = 100
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    dropout_mode: str = "state"
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    peephole: bool = False
    coupled: bool = False
    reset_after: bool = True
    reset_gate: bool = True
    candidate_activation: str = "tanh"
    num_heads: int = 1
    gate_activation: str = "sigmoid"
    preset: str | None = None
    forget_bias: float | None = None

    # The fields as JSON, for what travels as a text (`of_text` is the way back). No field, and made at once, because
    # Dynamo cannot make it while it traces.
    text: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def of_text(text: str) -> Options:
        """What has this `text`."""
        # JSON has no tuples.
        given = json.loads(text).items()
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
        return Options(**fields)

    @property
    def changes_recurrence(self) -> bool:
        """Whether the time loop itself is another: else a plain layer's runs, whatever it is given."""
        return (
            self.layer_norm is not None
            or self.cell_norm is not None
            or self.zoneout != (0.0, 0.0)
            or self.recurrent_dropout > 0
            or self.peephole
            or self.coupled
            or self.batch_norm is not None
            or not self.reset_after
            or not self.reset_gate
            or self.candidate_activation != "tanh"
            or self.num_heads > 1
            or self.gate_activation != "sigmoid"
        )

    @property
    def is_exponential(self) -> bool:
        """Whether it is the sLSTM."""
        return self.gate_activation == "exponential"

    @property
    def normalises(self) -> bool:
        return self.layer_norm is not None or self.cell_norm is not None

    @property
    def why_no_kernel(self) -> str | None:
        """Why no backend has kernels for it, in words."""
        return (
            "recurrent batch norm takes statistics over the batch in each step" * (self.batch_norm == "recurrent")
            or None
        )

    @property
    def words(self) -> str:
        """What an op is told in words of what its tensors do not say."""
        given = {
            "hard_sigmoid": self.gate_activation == "hard_sigmoid",
            "exponential": self.is_exponential,
            "rms": self.norm == "rms",
            "carried": self.cell_norm == "carried",
            "reset_first": not self.reset_after,
            "relu": self.candidate_activation == "relu",
        }
        return " ".join(word for word, is_so in given.items() if is_so)

    def hidden_size(self, weight_hh: Tensor) -> int:
        """H, by W_hh (G*H, H / num_heads)."""
        return weight_hh.shape[1] * self.num_heads

    @property
    def masks_of_steps(self) -> int:
        """How many bool masks of (rows, H) a direction draws in training."""
        return sum(p > 0 for p in self.zoneout)

    def gates(self, of_cell: int) -> int:
        """G, of a cell that has so many."""
        return of_cell - 1 if self.coupled or not self.reset_gate else of_cell

    def parameters(self, gates: int, hidden_size: int, has_cell_state: bool) -> dict[str, tuple[int, float | None]]:
        """By kind: the size of a layer's parameter beside torch.nn's, and what it is filled with at first; None: as
        torch.nn fills the others."""
        # A norm's own bias is there whether or not the layer has biases: as torch.nn.RMSNorm, "rms" has none.
        width, has_bias = gates * hidden_size, self.norm == "layer"
        found: dict[str, tuple[int, float | None]] = {}
        if self.layer_norm == "separate":
            found |= {"weight_norm_ih": (width, 1.0), "weight_norm_hh": (width, 1.0)}
        if self.layer_norm == "joint":
            found |= {"weight_norm": (width, 1.0)} | ({"bias_norm": (width, 0.0)} if has_bias else {})
        if self.cell_norm is not None:
            found |= {"weight_norm_c": (hidden_size, 1.0)} | ({"bias_norm_c": (hidden_size, 0.0)} if has_bias else {})
        if self.batch_norm is not None:
            first = 1.0 if self.batch_norm == "sequence" else 0.1
            found["weight_batch_norm_ih"] = (width, first)
        if self.batch_norm == "recurrent":
            found["weight_batch_norm_hh"] = (width, 0.1)
            if has_cell_state:
                found |= {"weight_batch_norm_c": (hidden_size, 0.1), "bias_batch_norm_c": (hidden_size, 0.0)}
        if self.peephole:
            # Of i, f, o; coupled, of i and o.
            found["weight_peephole"] = ((2 if self.coupled else 3) * hidden_size, None)
        return found

    def statistics(self, gates: int, hidden_size: int, has_cell_state: bool) -> dict[str, tuple[int, ...]]:
        """By kind: the shape of the running statistics that a layer has."""
        width = gates * hidden_size
        if self.batch_norm is None:
            return {}
        if self.batch_norm == "sequence":
            return {"ih": (width,)}
        found: dict[str, tuple[int, ...]] = dict.fromkeys(("ih", "hh"), (self.batch_norm_steps, width))
        return found | ({"c": (self.batch_norm_steps, hidden_size)} if has_cell_state else {})

    def check_module(self, module: Any) -> None:
        """Raises ValueError where the module's other arguments do not go with these."""
        cls = type(module).__name__
        if self.forget_bias is not None and self.layer_norm == "joint":
            # What stands inside a norm is taken off again.
            if self.norm == "rms":
                raise ValueError(f"{cls}: forget_bias: expected None with a joint norm that has no bias, norm='rms'")
        elif self.forget_bias is not None and not module.bias:
            raise ValueError(f"{cls}: forget_bias: expected None with bias=False")
        if module.hidden_size % self.num_heads:
            raise ValueError(
                f"{cls}: num_heads: expected a divisor of hidden_size={module.hidden_size}, got {self.num_heads}"
            )
        proj_size: Any = getattr(module, "proj_size", None)
        if self.changes_recurrence and proj_size:
            raise ValueError(f"{cls}: proj_size: expected 0 with {self}, got {proj_size}")

    def initialize(self, module: Any, gates: int, has_cell_state: bool, suffixes: list[str]) -> None:
        """What torch.nn's initialisation, which fills every parameter alike, does not know.

        Args:
            module: the layer or cell, whose parameters are there.
            gates: G.
            has_cell_state: of the cell.
            suffixes: of the parameters' names, one for each layer and direction.
        """
        hidden_size = module.hidden_size
        for suffix in suffixes:
            for kind, (_, value) in self.parameters(gates, hidden_size, has_cell_state).items():
                if value is not None:
                    nn.init.constant_(getattr(module, kind + suffix), value)
            for kind in self.statistics(gates, hidden_size, has_cell_state):
                nn.init.constant_(getattr(module, f"running_mean_{kind}{suffix}"), 0)
                nn.init.constant_(getattr(module, f"running_var_{kind}{suffix}"), 1)
            if self.preset == "dreamer_v3":
                # There h' = u n + (1 - u) h with u = sigmoid(LN(.) - 1). Ours is z = 1 - u = sigmoid(1 - LN(.)).
                _fill_second_gate(module, hidden_size, {f"weight_norm{suffix}": -1.0, f"bias_norm{suffix}": 1.0})
            if self.forget_bias is not None:
                biases = {f"bias_ih{suffix}": self.forget_bias, f"bias_hh{suffix}": 0.0}
                if self.layer_norm == "joint":
                    biases = {f"bias_norm{suffix}": self.forget_bias}
                _fill_second_gate(module, hidden_size, biases)

    def __str__(self) -> str:
        """As keyword arguments, those that are not the default."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _fill_second_gate(module: Any, hidden_size: int, values: dict[str, float]) -> None:
    """The part of f, or of z, in the parameters of these names."""
    for name, value in values.items():
        parameter: Tensor = getattr(module, name)
        nn.init.constant_(parameter.data[hidden_size : 2 * hidden_size], value)


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def taken_from(
    cls: str, keywords: dict[str, Any], has_cell_state: bool, gates: int, refused: dict[str, str]
) -> Options | None:
    """The options among a constructor's keyword arguments, which loses them; None where nothing is to be done.

    Args:
        cls: the module's class, for messages.
        keywords: all that the constructor was given by name.
        has_cell_state, gates: of the cell.
        refused: options that this class does not have, and why.

    Raises:
        TypeError, ValueError: a value is not one of an option's, or the cell has nothing for it.
    """
    given = {name: keywords.pop(name) for name in NAMES if name in keywords}
    if not given:
        return None
    for name in refused.keys() & given.keys():
        raise TypeError(f"{cls}: {name}: {refused[name]}")
    preset = given.get("preset")
    if preset is not None and _value(cls, "preset", preset, has_cell_state) is not None:
        of_gates, stands_for = _PRESETS[preset]
        if of_gates != gates:
            raise ValueError(f"{cls}: preset: {preset!r} is a GRU")
        for name, value in stands_for.items():
            if name in refused:
                raise TypeError(f"{cls}: preset: {preset!r} has {name}: {refused[name]}")
            if given.setdefault(name, value) != value:
                raise ValueError(f"{cls}: {name}: expected {value!r} with preset={preset!r}, got {given[name]!r}")
    options = Options(**{name: _value(cls, name, value, has_cell_state) for name, value in given.items()})
    if options == Options():
        return None
    _check(cls, options, has_cell_state, gates)
    return options


def _value(cls: str, name: str, value: Any, has_cell_state: bool) -> Any:
    """Of the right type and range, in the form that `Options` keeps."""
    if name in _CHOICES:
        if not (value is None or isinstance(value, str)) or value not in _CHOICES[name]:
            raise ValueError(f"{cls}: {name}: expected one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}")
        return value
    if name in ("peephole", "coupled", "reset_after", "reset_gate"):
        if not isinstance(value, bool):
            raise TypeError(f"{cls}: {name}: expected a bool, got {value!r}")
        return value
    if name in ("num_heads", "batch_norm_steps"):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{cls}: {name}: expected an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{cls}: {name}: expected at least 1, got {value!r}")
        return int(value)
    if name == "zoneout":
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(f"{cls}: zoneout: expected (of h, of c) or one number, got {value!r}")
            of_h, of_c = (finite_number(cls, name, each, 0, 1) for each in value)
            if of_c and not has_cell_state:
                raise ValueError(f"{cls}: zoneout: expected one number: there is no cell state, got {value!r}")
            return (of_h, of_c)
        both = finite_number(cls, name, value, 0, 1)
        return (both, both if has_cell_state else 0.0)
    if name in _PROBABILITIES or name == "batch_norm_momentum":
        return finite_number(cls, name, value, 0, 1)
    if name == "norm_eps":
        return finite_number(cls, name, value, 0, math.inf)
    return None if value is None else finite_number(cls, name, value, -math.inf, math.inf)


def finite_number(cls: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """The value; TypeError or ValueError, in the name of `cls`, where it is none from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{cls}: {name}: expected a number, got {value!r}")
    given = value
    try:
        value = float(given)
    except OverflowError:
        value = math.inf
    if not least <= value <= most or not math.isfinite(value):
        bounds = f" from {least:g} to {most:g}" if most < math.inf else f" of at least {least:g}" * (least == 0)
        raise ValueError(f"{cls}: {name}: expected a finite number{bounds}, got {given!r}")
    return value


def _check(cls: str, options: Options, has_cell_state: bool, gates: int) -> None:
    """What goes together."""
    default = Options()
    for name in _NEEDS_CELL_STATE if not has_cell_state else ():
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"{cls}: {name}: expected {getattr(default, name)!r}: the LSTM alone has it")
    for name in _NEEDS_GATES if gates == 1 else ():
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"{cls}: {name}: expected {getattr(default, name)!r}: the RNN has no gates")
    if options.forget_bias is not None and options.coupled:
        raise ValueError(f"{cls}: forget_bias: expected None with coupled=True, where f = 1 - i has no bias of its own")
    for name in _NEEDS_RESET if gates != 3 else ():
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"{cls}: {name}: expected {getattr(default, name)!r}: the GRU alone has it")
    if not options.reset_after and not options.reset_gate:
        raise ValueError(f"{cls}: reset_after: expected True with reset_gate=False")
    if options.batch_norm == "recurrent" and not options.reset_after:
        raise ValueError(f"{cls}: batch_norm: expected None or 'sequence' with reset_after=False, got 'recurrent'")
    if options.batch_norm is not None and options.normalises:
        raise ValueError(f"{cls}: batch_norm: expected None with layer_norm or cell_norm, got {options.batch_norm!r}")
    for name, wanted in (("batch_norm_momentum", ("sequence", "recurrent")), ("batch_norm_steps", ("recurrent",))):
        if getattr(options, name) != getattr(default, name) and options.batch_norm not in wanted:
            raise ValueError(f"{cls}: {name}: goes with batch_norm={' or '.join(map(repr, wanted))}")
    if not options.reset_after and options.layer_norm is not None:
        raise ValueError(f"{cls}: layer_norm: expected None with reset_after=False, got {options.layer_norm!r}")
    for name in ("norm", "norm_eps"):
        normalises = options.normalises or (name == "norm_eps" and options.batch_norm is not None)
        if not normalises and getattr(options, name) != getattr(default, name):
            raise ValueError(
                f"{cls}: {name}: goes with layer_norm or cell_norm{' or batch_norm' * (name == 'norm_eps')}"
            )
    if options.dropout_mode != "state" and not options.recurrent_dropout:
        raise ValueError(f"{cls}: dropout_mode: goes with recurrent_dropout")
