"""Why norms stay: every reason once, with its code, its text, what it means and what can be done about it.

A `Cause` is a constant; a `Reason` is one case of it, with the operator and the module where it arose. The page of
reasons in the documentation is made from the causes (``python -m bnfuse.tools.reference``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reason:
    """Why a norm stays: what refused, and where.

    Attributes:
        code: names the cause, whatever the wording; that of the innermost one where one reason holds another.
        text: the reason in words.
        operator: the operator that refused, None if it was no operator.
        module: the module that ran it.
        direction: "backward", "forward" or "beside", the way that was tried; None if none was.
        step: which of the operators that ran it was, counted from 0; None if that is not known.
    """

    code: str
    text: str
    operator: str | None = None
    module: str | None = None
    direction: str | None = None
    step: int | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.operator, self.module) if part)
        text = f"{where}: {self.text}" if where else self.text
        return f"{self.direction}: {text}" if self.direction else text


@dataclass(frozen=True)
class Cause:
    """What can keep a norm; a rule of your own may make one of its own.

    Attributes:
        code: a name that stays the same when the wording changes, in lower case with hyphens.
        text: what is wrong, with ``{fields}`` for what differs; ``{why}`` stands for another reason.
        meaning: what that is, for somebody who reads it for the first time.
        advice: what can be done about it.
        group: the heading under which it is explained.
    """

    code: str
    text: str
    meaning: str
    advice: str
    group: str = ""

    def reason(
        self,
        operator: str | None = None,
        module: str | None = None,
        step: int | None = None,
        why: Reason | None = None,
        **values: Any,
    ) -> Reason:
        """One case of the cause.

        Args:
            operator, module, step: where it arose.
            why: the reason that the text holds as ``{why}``.
            values: the other fields of the text.
        """
        if why is not None:
            return Reason(why.code, self.text.format(why=why.text, **values), operator, module, step=step)
        return Reason(self.code, self.text.format(**values), operator, module, step=step)


CAUSES: dict[str, Cause] = {}
"""Every cause, by its code, in the order in which they are explained."""

_heading = ""


def _group(heading: str) -> None:
    global _heading
    _heading = heading


def _cause(code: str, text: str, meaning: str, advice: str) -> Cause:
    return CAUSES.setdefault(code, Cause(code, text, meaning, advice, _heading))


_group("The norm cannot be taken out of the code")

DID_NOT_RUN = _cause(
    "did-not-run",
    "it did not run, so nothing is known of where it belongs",
    "The example inputs led past it: an auxiliary head, a branch that is switched off.",
    "Pass inputs that reach it; or nothing, since it costs nothing.",
)
TRACKS_NO_STATISTICS = _cause(
    "tracks-no-statistics",
    "it uses the statistics of the batch, since it tracks none of its own",
    "`track_running_stats=False`: the output depends on the whole batch and is no fixed map.",
    "Train it with running statistics.",
)
USES_BATCH_STATISTICS = _cause(
    "uses-batch-statistics",
    "it uses the statistics of the batch",
    "`F.batch_norm(..., training=True)`: the output depends on the whole batch and is no fixed map.",
    "Pass `training=self.training` and running statistics.",
)
IS_PREPARED = _cause(
    "prepared-for-quantisation",
    "{place} is prepared for quantisation: what it measures and rounds is made with the norm",
    "`prepare` and `prepare_qat`: observers have measured the ranges that they saw with the norm. A `ConvBn2d` of "
    "quantisation-aware training folds the norm into the weight itself, in each step, before it rounds the weight.",
    "Fuse before `prepare` or `prepare_qat`; or, after training, let `convert` fold what `ConvBn2d` holds.",
)
HAS_HOOK = _cause(
    "has-hook",
    "it has a forward hook, which would be lost",
    "The hook belongs to the module that would go.",
    "`options=bnfuse.Options(hooks='ignore')`, if the hook need not see the same numbers; or register it on the layer "
    "that took the norm up.",
)
REFERENCED_ELSEWHERE = _cause(
    "referenced-elsewhere",
    "the model also refers to it from {place}, where it cannot be replaced",
    "A list, a dictionary or a bound method holds the norm as a plain attribute.",
    "Use `nn.ModuleList` or `nn.ModuleDict`.",
)
IS_SCRIPTED = _cause(
    "is-scripted",
    "it is compiled by TorchScript, in which no module can be replaced",
    "A scripted or traced part of the model.",
    "Fuse before compiling.",
)
PARAMETERS_READ_ELSEWHERE = _cause(
    "parameters-read-elsewhere",
    "its parameters are also read by {reader}",
    "The code reads the norm's weight, bias or statistics apart from calling it.",
    "Call the norm and read nothing of it.",
)
FAILS_ON_OTHER_INPUTS = _cause(
    "fails-on-other-inputs",
    "without it the model would give something else for other inputs, which its code treats apart",
    "The code looks at a size or an element, or keeps something for the next call, and takes another way there: "
    "tried on other inputs and in a second call, the fused model gave something else.",
    "Nothing; or write the code without the branch.",
)
FAILS_ON_OTHER_INPUTS_WITH_OTHERS = _cause(
    "fails-on-other-inputs-with-others",
    "without it and others the model would give something else for other inputs, and it was not tried which of "
    "them could still go",
    "The code looks at a size or an element, or keeps something for the next call. Tried on other inputs, nearly "
    "every group of norms failed; each trial runs the whole model, so no more were made.",
    "Name the norms that matter least with `keep=`.",
)
FAILS_ON_OTHER_INPUTS_TOGETHER = _cause(
    "fails-on-other-inputs-together",
    "it could go alone, but with others the model would give something else for other inputs",
    "The code looks at a size or an element, or keeps something for the next call. Each norm alone passed the "
    "trial on other inputs, all of them together did not.",
    "Name the norms that matter least with `keep=`.",
)
MODULE_IS_LOOKED_AT = _cause(
    "module-is-looked-at",
    "without it the code around it does something else: it looks at the module",
    "The fused model failed or gave something else, since the code reads an attribute or the class of the norm, "
    "or holds it in a place of its own.",
    "Call the norm and do nothing else with it.",
)
IS_THE_MODEL = _cause(
    "is-the-model",
    "it is the whole model",
    "There is nothing around it to take it up.",
    "Fuse the model that holds it.",
)
FORWARD_DOES_MORE = _cause(
    "forward-does-more",
    "{kind}.forward does more than {work}",
    "Its forward computes something besides one affine map and calls of its own children, or gives another shape "
    "or dtype.",
    "Move the rest of the code out of the module.",
)
IS_FUNCTION_CALL = _cause(
    "is-function-call",
    "the norm is a function call in the code, not a module that can be replaced",
    "`F.batch_norm` in a forward: no attribute can make it go away. In an exported graph: its parameters are "
    "computed, or it stands in a graph inside of the graph (`torch.no_grad()`, `cond`).",
    "Make it a `nn.BatchNorm2d` that is called; or export the model and fuse the program. Of a program, fuse "
    "`program.run_decompositions({})`, which takes inner graphs apart.",
)
CALLER_KEEPS = _cause(
    "caller-keeps",
    "the caller asked to keep {pattern!r}",
    "It is named by `keep=`.",
    "Leave it out of `keep`.",
)
OVER_BUDGET = _cause(
    "over-budget",
    "folding it would cost more precision than the budget of {budget:g}",
    "With `budget=`: with this norm folded too, the outputs would stray further than that.",
    "A larger budget, or fuse in float32.",
)

_group("A tensor must stay as it is")

OUTPUT_FIXED = _cause(
    "output-fixed",
    "its output cannot change units: {why}",
    "What the operator makes must stay as it is; the reason follows.",
    "See the reason that follows.",
)
TENSOR_FIXED = _cause(
    "tensor-fixed",
    "{tensor} cannot change units: {why}",
    "A tensor that no operator has made must stay as it is; the reason follows.",
    "See the reason that follows.",
)
IS_INPUT = _cause(
    "is-input",
    "it is an input of the model",
    "The caller decides what it holds.",
    "Nothing; or fold the norm into the preparation of the data yourself.",
)
IS_OUTPUT = _cause(
    "is-output",
    "it is an output of the model",
    "The caller reads it. A norm at the very end can only go backward.",
    "If the output is not needed, do not return it.",
)
IS_STORED = _cause(
    "is-stored",
    "it is stored in {place}",
    "The forward keeps it in an attribute or container of the model, where others may read it.",
    "Do not store it; or store what stands behind the norm.",
)
IS_HELD = _cause(
    "is-held",
    "somebody outside of the model still holds it after the run",
    "The forward put the tensor into a list of the caller's, a global, a closure or an object of its own, where it is "
    "seen.",
    "Do not keep it; or keep what stands behind the norm.",
)
MEETS_UNSEEN_ARGUMENT = _cause(
    "meets-unseen-argument",
    "an argument that was not given would meet it",
    "The forward takes an argument that the example inputs leave out (`mask=None`), and computes with it here. What it "
    "would be is not known.",
    "Give such a call too: `fuse(model, x, calls=[bnfuse.Call(x, mask=mask)])`. If the argument is never used, "
    "`Options(infer_calls=False)` leaves it out of account.",
)
IDLE_NORM_MAY_READ = _cause(
    "idle-norm-may-read",
    "{name}, which did not run, may read it another time",
    "A norm beside those that ran takes as many channels, and took no part: one of several of which one is chosen.",
    "Give calls that reach it: `fuse(model, x, calls=[bnfuse.Call(x, domain=1)])`.",
)
HOOK_READS = _cause(
    "hook-reads",
    "a hook on {owner} reads it",
    "A hook sees the tensor, and may do anything with it.",
    "Remove the hook before fusing; or `options=bnfuse.Options(hooks='ignore')`, if it may see other numbers.",
)
LEAVES_PYTORCH = _cause(
    "leaves-pytorch",
    "its contents leave PyTorch by {how}",
    "`.numpy()`, `.tolist()`, other memory by `weight.data = ...` and the like: what is done with them is not seen.",
    "Use PyTorch's operators.",
)
IS_DIFFERENTIATED = _cause(
    "is-differentiated",
    "gradients are taken of it or by it, or it is one",
    "Code that calls `torch.autograd.grad`, `backward` or `register_hook` sees gradients in the tensor's own units.",
    "Nothing; norms between what is differentiated and what it is differentiated by can go.",
)
IS_READ_IN_A_THREAD = _cause(
    "is-read-in-a-thread",
    "{owner} reads or makes it in a thread of its own",
    "The forward starts threads, and what they do is not seen.",
    "Call the layers one after the other.",
)
IS_CHOSEN = _cause(
    "is-chosen",
    "{how} chooses by contents what becomes of it, or makes it",
    "`torch.cond` and `while_loop` may do something else with it, or something else more often, for other inputs.",
    "Nothing; or write it as Python code, which is followed.",
)
IS_WRITTEN = _cause(
    "is-written",
    "it is written to during the run",
    "A parameter or buffer that the forward itself changes.",
    "Nothing; or keep such state out of the path.",
)
IS_MULTIPLIED_IN = _cause(
    "is-multiplied-in",
    "the run multiplies a parameter by it in place",
    "A mask of zeros and ones in `weight.data *= mask`: a factor of it would count once more at every call.",
    "Nothing.",
)
WRITTEN_THROUGH_VIEW = _cause(
    "written-through-view",
    "its memory is written through another view",
    "A slice of it is assigned to, or a view of its memory is changed.",
    "Write the forward without assignment to slices (`torch.cat`, `torch.where`).",
)
IS_CONSTANT = _cause(
    "is-constant",
    "it is a constant that no parameter or saved buffer holds",
    "A buffer with `persistent=False`, or a tensor that the code keeps or makes. New contents would be lost.",
    "Register it as a parameter or a persistent buffer.",
)
IS_NOT_FLOATING = _cause(
    "is-not-floating",
    "it holds {dtype}",
    "A tensor of whole numbers, booleans or complex numbers, in which units cannot be expressed.",
    "Nothing.",
)
IS_SUBCLASS = _cause(
    "is-subclass",
    "{kind} is a tensor subclass",
    "Its operators may mean something else.",
    "Use a plain `nn.Parameter`.",
)
ELEMENTS_SHARE_MEMORY = _cause(
    "elements-share-memory",
    "several of its elements share memory",
    "One number in memory stands for several (`expand`), so they cannot be scaled apart.",
    "Make it dense: `.contiguous()`.",
)
SHARES_MEMORY = _cause(
    "shares-memory",
    "it shares memory with {other}",
    "Two parameters overlap in memory without being the same; writing to one changes the other.",
    "Give them memory of their own: `.clone()`.",
)
LAYER_NOT_NAMED = _cause(
    "layer-not-named",
    "layers= does not name {kind}",
    "With `layers=`: the parameter belongs to another class of layer.",
    "Name the class in `layers=`.",
)
HANDLER_READS = _cause(
    "handler-reads",
    "a handler looks after the layer that reads it",
    "With `handlers=`: the parameter belongs to a layer with a handler, and only that may change it.",
    "Nothing.",
)
WEIGHT_FIXED = _cause(
    "weight-fixed",
    "{parameter} cannot change: {why}",
    "A weight would be edited but must stay as it is; the reason follows.",
    "See the reason that follows.",
)
IS_NO_PARAMETER = _cause(
    "is-no-parameter",
    "it is no parameter",
    "What stands in the place of a weight cannot be edited. It is not expected to be read, since such a tensor "
    "is fixed for another reason too.",
    "Report it.",
)
HANDLER_MAKES = _cause(
    "handler-makes",
    "a handler looks after the layer that makes it",
    "A value inside a layer with a handler is also read outside of it.",
    "Let the layer return only what its handler folds into.",
)
IS_REPLACED = _cause(
    "is-replaced",
    "the run puts another tensor in its place",
    "The forward assigns to the parameter or buffer: the next call reads other contents.",
    "Nothing.",
)
MEMORY_READ_ANOTHER_WAY = _cause(
    "memory-read-another-way",
    "its memory is read in another way",
    "Another tensor has the same memory and was not made by an operator: `nn.Parameter(y)`, a tensor from "
    "another library.",
    "Make a copy (`y.clone()`).",
)
MODULE_DID_NOT_RUN = _cause(
    "module-did-not-run",
    "it is also {name}, whose module did not run",
    "A tied parameter whose other owner took no part in the run: it may be read there another time.",
    "Pass inputs that reach it, or untie it.",
)

_group("Two demands contradict each other")

TWO_UNITS = _cause(
    "two-units",
    "it would need two different units at once",
    "Two ways through the network ask for different units of one tensor.",
    "Nothing; of two norms on one stream only one can go.",
)
SHARED_WEIGHT = _cause(
    "shared-weight",
    "{parameter} is used more than once, and not every use asks for the same edit: see {other}",
    "The weight is shared, or read elsewhere, and the named use is served by the old contents.",
    '`restructure="untie"` gives each use a copy of its own (see restructuring.md).',
)
APPLIED_TO_OWN_OUTPUT = _cause(
    "applied-to-own-output",
    "it is applied to its own output",
    "The norm is called twice in a row, and its second input would need two units.",
    "Use two norms.",
)
DIFFERENT_SCALES = _cause(
    "different-scales",
    "its operands would get different scales",
    "In `u + v` one operand has a scale that the other cannot take, as in `n(u) + u`.",
    "Nothing.",
)
SHIFTS_DO_NOT_ADD_UP = _cause(
    "shifts-do-not-add-up",
    "the shifts of its operands do not add up",
    "All three tensors of a sum have their units already, and the shifts contradict each other.",
    "Nothing.",
)
SCALES_DO_NOT_FIT = _cause(
    "scales-do-not-fit",
    "the scales of its factors and its result do not fit",
    "All three tensors of a product have their units already, and the scales contradict each other.",
    "Nothing.",
)
SHIFTS_DO_NOT_FIT = _cause(
    "shifts-do-not-fit",
    "the shifts of its input and output do not fit",
    "Both sides of a product with a known factor have their units already, and the shifts contradict each other.",
    "Nothing.",
)
PADDING_DOES_NOT_FIT = _cause(
    "padding-does-not-fit",
    "its input and output would get different units",
    "Both sides of a padding have their units already, and they contradict each other.",
    "Nothing.",
)
NO_CHOICE_LEFT = _cause(
    "no-choice-left",
    "no choice is left",
    "The search has tried every alternative. The first refusal is printed in its place, so it is not expected to "
    "be read.",
    "Report it.",
)
TWO_EDITS_AT_ONE_OPERATOR = _cause(
    "two-edits-at-one-operator",
    "it reads one parameter in two places that ask for different edits",
    "A recurrent layer whose two directions share a parameter, say.",
    "Untie it.",
)

_group("An operator lets nothing pass")

IS_COMPLEX = _cause(
    "is-complex",
    "its number is complex",
    "A factor or term such as `1j`.",
    "Nothing.",
)
NOTHING_PASSES = _cause(
    "nothing-passes",
    "no scale or shift passes through it",
    "The operator has no rule, or not in this form: `silu(2*x)` has no fixed relation to `silu(x)`.",
    "Nothing; if the operator is linear, write it with one that has a rule, or register a rule of your own.",
)
DROPS_AT_RANDOM = _cause(
    "drops-at-random",
    "it drops elements at random",
    "Dropout that is active in evaluation.",
    "Pass `training=self.training`.",
)
MAKES_CONSTANT = _cause(
    "makes-constant",
    "it makes a constant",
    "Zeros, ones or random numbers of the shape of a tensor: nothing can rescale them.",
    "Nothing.",
)
ROUNDS = _cause(
    "rounds",
    "it rounds",
    "Division with a rounding mode.",
    "Nothing.",
)
MULTIPLIES_BY_ITSELF = _cause(
    "multiplies-by-itself",
    "it multiplies a tensor by itself",
    "A square takes the scale twice.",
    "Nothing.",
)
DIVIDES_A_NUMBER = _cause(
    "divides-a-number",
    "it divides a number by its input",
    "`1/(s*x + t)` is no scale and shift of `1/x`.",
    "Nothing.",
)
SUBTRACTS_FROM_ITSELF = _cause(
    "subtracts-from-itself",
    "it subtracts a tensor from itself",
    "The result is 0 whatever the shift.",
    "Remove the dead code.",
)
SLOPE_IS_FIXED = _cause(
    "slope-is-fixed",
    "its slope cannot change",
    "The slope of `prelu` would have to take units.",
    "Nothing.",
)
BENDS_ELSEWHERE = _cause(
    "bends-elsewhere",
    "it changes its slope elsewhere than at 0",
    "A clamp at another number than 0, from above, or between two tensors: `clamp(s*x, 1)` is not `s*clamp(x, 1)`.",
    '`restructure="clip"`, where it is a module such as ReLU6 or Hardtanh (see restructuring.md).',
)
QUERY_KEY_OR_MASK = _cause(
    "query-key-or-mask",
    "no scale or shift passes through queries, keys and masks",
    "A softmax stands between them and the output.",
    "Nothing.",
)
VALUES_ARE_KEYS = _cause(
    "values-are-keys",
    "its values are also its keys or queries",
    "The same tensor is read on both sides of the softmax.",
    "Nothing.",
)
LEFT_FACTOR = _cause(
    "left-factor",
    "no scale or shift passes through its left factor",
    "In `A @ v` the units of `A` would vary along the axis that is summed, or are not looked for.",
    "Nothing.",
)
DIFFERENT_RANKS = _cause(
    "different-ranks",
    "its operands have different numbers of axes",
    "A product of matrices with broadcast batches.",
    "Give both the same axes (`unsqueeze`, `expand`).",
)
GRID_IS_FIXED = _cause(
    "grid-is-fixed",
    "its grid cannot change units",
    "The grid of `grid_sample` holds positions.",
    "Nothing.",
)
OFFSETS_ARE_FIXED = _cause(
    "offsets-are-fixed",
    "its offsets cannot change units",
    "The offsets of a deformable convolution are positions, and its mask is a gate.",
    "Nothing.",
)
STATE_IS_FIXED = _cause(
    "state-is-fixed",
    "no scale or shift passes through its state",
    "What a recurrent layer makes has passed a saturating function.",
    "Nothing.",
)
STATISTICS_OF_INPUT = _cause(
    "statistics-of-input",
    "its statistics come from its input, which must stay as it is",
    "Layer, group and instance norms, and a batch norm with the statistics of the batch.",
    "Nothing.",
)
DIRECTION_IS_FIXED = _cause(
    "direction-is-fixed",
    "it normalises its direction, which must stay as it is",
    "The `v` of `w = g * v/norm(v)`.",
    "Nothing.",
)
HANDLER_TAKES_NO_INPUT_UNITS = _cause(
    "handler-takes-no-input-units",
    "its handler takes no units of its input",
    "A layer with a handler of yours takes up what comes after it, not what comes before it.",
    "Nothing.",
)
GATING_HALF = _cause(
    "gating-half",
    "its gating half cannot change units",
    "The half of `glu` that goes through the sigmoid.",
    "Nothing.",
)
SCATTERS_PRODUCTS = _cause(
    "scatters-products",
    "it multiplies",
    "`scatter` or `scatter_reduce` with products.",
    "Nothing.",
)
INDEX_IS_TENSOR = _cause(
    "index-is-tensor",
    "its index is a tensor",
    "`select` by a tensor.",
    "Use a number.",
)
START_IS_TENSOR = _cause(
    "start-is-tensor",
    "its start is a tensor",
    "`narrow` by a tensor.",
    "Use a number.",
)
ROLLS_FLATTENED = _cause(
    "rolls-flattened",
    "it rolls the flattened tensor",
    "`roll` without `dims`.",
    "Pass `dims`.",
)
IS_EMPTY = _cause(
    "is-empty",
    "it holds no elements",
    "An empty tensor, along which no units can be followed.",
    "Pass example inputs that are large enough.",
)

_group("A shift, a sign or a scale does not pass")

COUNTS_SHIFTS = _cause(
    "counts-shifts",
    "it adds up a shift as often as there are elements",
    "An `einsum` sums over a letter that its parameter does not have: the shift would be multiplied by a size.",
    "Take the mean first.",
)
POSITIONS_OF_MAXIMA = _cause(
    "positions-of-maxima",
    "the positions of its maxima are used, and they stay the same under a positive scale only",
    "`return_indices=True`, or an adaptive maximum, with a scale that is 0 or negative.",
    "Nothing.",
)
NO_NEGATIVE_SCALE = _cause(
    "no-negative-scale",
    "no negative scale passes through it",
    "Some `a` is negative, and `relu(-x)` is not `-relu(x)`.",
    '`restructure="clip"`, where the activation is a module between bounds such as ReLU (see restructuring.md).',
)
MAXIMUM_NEGATIVE_SCALE = _cause(
    "maximum-negative-scale",
    "no negative scale passes through a maximum",
    "The largest of `-x` is not minus the largest of `x`.",
    "Put the norm before the pooling.",
)
PADS_MINUS_INFINITY = _cause(
    "pads-minus-infinity",
    "minus infinity stays as it is under a positive scale only",
    "A padding for a maximum, and a scale of 0 or less.",
    "Use the padding of the pooling itself.",
)
NO_SHIFT = _cause(
    "no-shift",
    "no shift passes through it",
    "Some `c` is not 0, and `relu(x + t)` is not `relu(x) + t'`.",
    '`restructure="clip"`, where the activation is a module between bounds such as ReLU (see restructuring.md).',
)
GATE_SHIFT = _cause(
    "gate-shift",
    "no shift passes through a gate",
    "`(x + t)*g` leaves `t*g`, which depends on the input.",
    "Nothing.",
)
FACTOR_SHIFT = _cause(
    "factor-shift",
    "no shift passes through a factor",
    "A parameter is multiplied, and something else that reads it asks for a shift of it.",
    "Nothing.",
)
WEIGHTS_DO_NOT_SUM_TO_ONE = _cause(
    "weights-do-not-sum-to-one",
    "its weights do not sum to one, so no shift passes",
    "The left factor of a product of matrices is no softmax along its last axis.",
    "Nothing.",
)
DOES_NOT_DIVIDE = _cause(
    "does-not-divide",
    "it does not divide by the number of elements that it adds, so no shift passes",
    "Average pooling that counts padded zeros, or that divides by a number of its own.",
    "`count_include_pad=False` changes the network, but lets a norm pass.",
)
NO_SHIFT_OF_INPUT = _cause(
    "no-shift-of-input",
    "it takes no shift of its input: {why}",
    "The layer could take the scale of its input but not the shift; the reason follows.",
    "See the reason that follows.",
)
PADS_WITH_ZEROS = _cause(
    "pads-with-zeros",
    "it pads with zeros, which would not be shifted",
    "The border would have to be `-c/a`, but is 0.",
    "Put the norm behind the convolution; or another `padding_mode` when training anew.",
)
PATCHES_OVERLAP = _cause(
    "patches-overlap",
    "it adds patches that overlap",
    "`F.fold`: a pixel gets the shift as often as patches cover it.",
    "Put the norm behind it.",
)
SAMPLES_ZEROS = _cause(
    "samples-zeros",
    "it takes no shift: it samples zeros outside of the image",
    '`grid_sample` with `padding_mode="zeros"`.',
    "Put the norm behind it.",
)
NO_SHIFT_SINCE = _cause(
    "no-shift-since",
    "it takes no shift: {why}",
    "The operator could pass a scale but not a shift; the reason follows.",
    "See the reason that follows.",
)
PUTS_IN_A_NUMBER = _cause(
    "puts-in-a-number",
    "it puts in a number that does not change with the units",
    "`masked_fill(mask, 0)` puts in zeros, which would have to become `c`.",
    "Put the norm before the filling.",
)
DIFFERENT_TAPS = _cause(
    "different-taps",
    "not every output has the same taps",
    "In a transposed convolution with stride or a kernel larger than 1, outputs add different numbers of inputs.",
    "Put the norm behind it.",
)
PADS_WITH = _cause(
    "pads-with",
    "it pads with {number}, which cannot be rescaled",
    "The constant of a padding is a number in the code.",
    "Pad with 0.",
)
PADS_WITH_A_NUMBER = _cause(
    "pads-with-a-number",
    "it pads with a number, which would not be shifted",
    "The padded elements would have to take the shift.",
    "Put the norm behind the padding; or another padding mode when training anew.",
)
NO_BIAS = _cause(
    "no-bias",
    "it has no bias to take up a shift, and none can be added",
    "The layer is a function call, or its forward never reads a bias.",
    "Give it a bias.",
)
RECURRENT_WITHOUT_BIAS = _cause(
    "recurrent-without-bias",
    "it has no bias to take up a shift",
    "A recurrent layer with `bias=False`.",
    "`bias=True`.",
)
NO_WEIGHT = _cause(
    "no-weight",
    "it has no weight to take up a scale, and none can be added",
    "A norm without `affine`, as a function call.",
    "`affine=True`.",
)
ADDED_ANY_NUMBER_OF_TIMES = _cause(
    "added-any-number-of-times",
    "it takes no shift: an element may be added any number of times",
    "`scatter_add` and `index_add` add up what comes to the same place, and a shift with it.",
    "Put the norm behind the layer before it.",
)
EMPTY_BAG = _cause(
    "empty-bag",
    "a bag may be empty, and gives zeros",
    "`nn.EmbeddingBag` with offsets or a padding index: a bag that holds no rows gives zeros, which are not shifted.",
    "Pass a table of indices without padding.",
)
DEVIATION_SHIFT = _cause(
    "deviation-shift",
    "a deviation takes no shift",
    "The norm behind a `std` or `var` shifts its result; no scale or shift of the input does that.",
    "Nothing.",
)
DEVIATION_NEGATIVE_SCALE = _cause(
    "deviation-negative-scale",
    "a deviation takes no negative scale",
    "The norm behind a `std` or `var` turns its sign around, and no deviation is negative.",
    "Nothing.",
)
ADDS_A_NUMBER = _cause(
    "adds-a-number",
    "it adds a number",
    '`scatter` with `reduce="add"` and a number, which does not change with the units.',
    "Nothing.",
)

_group("The units vary along another axis")

EINSUM_PARAMETER_HAS_NO_AXIS = _cause(
    "einsum-parameter-has-no-axis",
    "its parameter has no axis for the units",
    "An `einsum` whose units vary along a letter that the parameter lacks.",
    "Nothing.",
)
WEIGHT_HAS_NO_AXIS = _cause(
    "weight-has-no-axis",
    "its weight has no axis for units that vary along axis {axis} of its {side}",
    "A linear layer works on the last axis and a convolution on the channels; the norm reads another axis, even "
    "if the two have equally many elements.",
    "Transpose in the network, if the axis is a mistake.",
)
GAIN_HAS_NO_AXIS = _cause(
    "gain-has-no-axis",
    "its gain and bias have no axis for the units",
    "A layer, group or instance norm has one gain for each channel or feature; the norm to be removed works "
    "along another axis.",
    "Transpose in the network, if the axis is a mistake.",
)
GAIN_PER_CHANNEL = _cause(
    "gain-per-channel",
    "it has one gain and bias per channel",
    "A batch norm that stays has one gain for each channel; the norm to be removed works along another axis.",
    "Transpose in the network, if the axis is a mistake.",
)
ROW_PER_TOKEN = _cause(
    "row-per-token",
    "its table has one row for each token",
    "The rows of an embedding cannot differ between places in the sequence, and the norm does.",
    "Transpose in the network, if the axis is a mistake.",
)
COLUMN_PER_FEATURE = _cause(
    "column-per-feature",
    "its weight has one column for each feature",
    "A recurrent layer works on the last axis; the norm works along another one.",
    "Transpose in the network, if the axis is a mistake.",
)
HANDLER_PER_CHANNEL = _cause(
    "handler-per-channel",
    "its handler takes units per channel, along axis 1",
    "A handler is given one scale and shift for each channel; the norm works along another axis.",
    "Transpose in the network, if the axis is a mistake.",
)
MAGNITUDE_HAS_NO_AXIS = _cause(
    "magnitude-has-no-axis",
    "its magnitude has no axis for the units",
    "`weight_norm` along another axis than the layer's outputs (as by default for transposed convolutions), or "
    "along none.",
    "`weight_norm(layer, dim=...)`; or make the weight a plain one first (`remove_parametrizations`).",
)
OPERAND_IS_BROADCAST = _cause(
    "operand-is-broadcast",
    "an operand that is broadcast has no axis for the units",
    "It holds one number where the units need one for each channel.",
    "Expand the layer that makes it to all channels.",
)
FACTOR_IS_BROADCAST = _cause(
    "factor-is-broadcast",
    "a factor that is broadcast has no axis for the units",
    "A factor holds one number where the units need one for each channel.",
    "Expand the layer that makes it to all channels.",
)
NO_AXIS_FOR_SHIFT = _cause(
    "no-axis-for-shift",
    "none of its operands has an axis for the shift",
    "The shift varies along two axes, of which each operand has one.",
    "Nothing.",
)
MIXES_ELEMENTS = _cause(
    "mixes-elements",
    "it mixes elements with different units",
    "A product of matrices adds elements of several channels.",
    "Nothing.",
)
POOLED_DIFFER = _cause(
    "pooled-differ",
    "the units differ among the elements that it pools",
    "A mean over the channels themselves.",
    "Nothing.",
)
OUTPUTS_DIFFER = _cause(
    "outputs-differ",
    "the units differ among its outputs",
    "The norm tells apart positions that come from one pooling.",
    "Nothing.",
)
ADDS_DIFFERENT_SCALES = _cause(
    "adds-different-scales",
    "it adds elements with different scales",
    "A sum over the channels.",
    "Nothing.",
)
PADDED_AXIS_VARIES = _cause(
    "padded-axis-varies",
    "the units vary along the axis that it pads",
    "The copies at the border belong to other channels than what they are a copy of.",
    "Nothing.",
)
COPIES_DIFFER = _cause(
    "copies-differ",
    "the units differ among the copies that it makes",
    "`expand` or `repeat` makes several channels of one, and the norm treats them differently.",
    "Nothing.",
)
TAKEN_TWICE = _cause(
    "taken-twice",
    "it takes an element more than once",
    "An index makes several elements of one, and the norm treats them differently.",
    "Nothing.",
)
TAPS_DIFFER = _cause(
    "taps-differ",
    "the units differ among the taps of a channel",
    "`F.unfold` copies a channel to each tap of its patches, and the norm treats the copies differently.",
    "Nothing.",
)
POSITIONS_DIFFER = _cause(
    "positions-differ",
    "the units vary over the positions of its patches",
    "The norm tells apart places in an image that is taken apart into patches.",
    "Nothing.",
)
AVERAGED_DIFFER = _cause(
    "averaged-differ",
    "the units differ among the elements that it averages",
    "The norm tells apart places in an image that is sampled in between them.",
    "Nothing.",
)
INDEXED_BY_TENSOR = _cause(
    "indexed-by-tensor",
    "the units vary along an axis whose places a tensor tells",
    "An index that depends on the input, a mask, or several indices at once take channels, and nobody knows which.",
    "Use one list of numbers.",
)

_group("A layer parallel to the norm cannot take it up")

SKIPS_POSITIONS = _cause(
    "skips-positions",
    "it skips positions of its input",
    "A stride: some positions of the input have no output of their own.",
    "Nothing.",
)
NO_TAP_AT_POSITION = _cause(
    "no-tap-at-position",
    "no tap of its kernel reads the position that it writes to",
    "The padding is no whole number of taps, as with an even kernel and dilation; or channels are padded.",
    "Another kernel when training anew.",
)
WEIGHT_IS_MADE = _cause(
    "weight-is-made",
    "its weight is no parameter of its own, so single entries of it cannot change",
    "The weight is the result of operators.",
    "Make it a plain one (`remove_parametrizations`).",
)
ADDS_MORE_THAN_NORM = _cause(
    "adds-more-than-norm",
    "it would have to add much more than the norm gives, which costs precision",
    "The input of the norm is much larger than its output. The layer would have to cancel it, and what is left "
    "would be rounding.",
    "Nothing; or fuse in a higher precision.",
)

_group("The numbers do not allow it")

MEAN_TOO_FAR_FOR_NEXT_LAYER = _cause(
    "mean-too-far-for-next-layer",
    "a mean lies {distance:.0f} standard deviations from 0, which costs precision in the layers after it",
    "Folded forward, the mean goes through the next layer and is taken away from its rounded output.",
    "Centre the data that the norm reads, or fuse in float64.",
)
NORM_NOT_FINITE = _cause(
    "norm-not-finite",
    "its statistics or parameters are not finite",
    "`a` or `c` is not a number, or infinite: the model is broken on that channel, or the variance is negative.",
    "Look at `running_var`.",
)
EDIT_NOT_FINITE = _cause(
    "edit-not-finite",
    "the edit of a parameter would not be finite",
    "A parameter next to the norm holds `nan` or an infinite number, or the fold would make one.",
    "Look for it in the layers that the norm feeds.",
)
DIVIDES_BY_ZERO = _cause(
    "divides-by-zero",
    "it divides by 0",
    "A number 0 in the code: nothing finite passes.",
    "Mend the code.",
)
MULTIPLIES_BY_ZERO = _cause(
    "multiplies-by-zero",
    "it multiplies by 0",
    "A number 0 in the code, as a factor or as `alpha=0`: the tensor has no influence, and no shift of it gives "
    "one of the result.",
    "Mend the code.",
)
IS_RANDOM = _cause(
    "is-random",
    "its contents are random",
    "A factor or term is drawn anew at every run.",
    "Draw it once, as a buffer.",
)
UNDOES_ZERO_SCALE = _cause(
    "undoes-zero-scale",
    "it would have to undo a scale of (nearly) 0",
    "Some `a` is 0, or its inverse leaves the safe range (1e-8 to 1e8), and this layer would have to be divided by it.",
    "Prune the dead channel; or nothing.",
)
MEAN_TOO_FAR = _cause(
    "mean-too-far",
    "a mean would lie {distance:.0f} standard deviations from 0, which costs precision",
    "A norm that stays would have to take a large shift of its input away again: its `beta` is many times its `gamma`.",
    "Nothing; or fold in a higher precision.",
)
SHIFT_TOO_LARGE = _cause(
    "shift-too-large",
    "its values would be {ratio:.0e} times smaller than their shift, which costs precision",
    "A tensor that something else still reads would be small beside the shift that is added to it: its digits "
    "would be lost.",
    "Nothing; or fold in a higher precision.",
)
PARAMETER_UNDOES_ZERO_SCALE = _cause(
    "parameter-undoes-zero-scale",
    "a scale of (nearly) 0 would have to be undone",
    "Some `a` is 0, or its inverse leaves the safe range (1e-8 to 1e8), and a parameter would have to be divided "
    "by it.",
    "Prune the dead channel; or nothing.",
)
OUT_OF_RANGE = _cause(
    "out-of-range",
    "{parameter} would leave the range of {dtype}",
    "In float16 the folded weight would be infinite.",
    "Fuse in float32, then convert.",
)
GAIN_IS_ZERO = _cause(
    "gain-is-zero",
    "no shift of its input undoes one of its output where it multiplies by 0",
    "A known factor is 0 on some channel, so the shift cannot come from before it.",
    "Nothing.",
)
NUMBERS_DEPEND_ON_INPUT = _cause(
    "numbers-depend-on-input",
    "its numbers depend on the size or the contents of the input",
    "`x / x.shape[-1]`, `x * x.max().item()`, a padding that is computed from the size, and the like: the plan "
    "would hold for one input.",
    "Use `mean`, or a fixed number.",
)
CONTENTS_DEPEND_ON_SIZE = _cause(
    "contents-depend-on-size",
    "its contents depend on the size of the input",
    "A tensor that the code makes has other contents for inputs of another size: the plan would hold for one size.",
    "Make it a buffer.",
)
CONTENTS_DEPEND_ON_RUN = _cause(
    "contents-depend-on-run",
    "its contents depend on the run",
    "A shift meets a weight or factor whose contents are known only while the model runs.",
    "Nothing; or make it a parameter or buffer.",
)
CONTENTS_ARE_WRITTEN = _cause(
    "contents-are-written",
    "its contents are written in place",
    "The path to a weight writes to a tensor, so that it cannot be replayed.",
    "Use the form without underscore.",
)

_group("Memory would be shared wrongly")

OVERWRITES = _cause(
    "overwrites",
    "without the norm it would overwrite in place what {reader} still reads",
    "The norm made a copy; the function that works in place would now write to the tensor before it.",
    "Use the form without underscore, or a module with `inplace`.",
)
OTHER_LAYOUT = _cause(
    "other-layout",
    "without the norm it would get a tensor with another layout in memory, which makes a difference to it",
    "The norm made a slice or transposed tensor dense, and `view` needs that, or a reshaped copy is written to.",
    "`reshape` in place of `view`; or `.contiguous()` behind the slice.",
)

_group("The structure cannot be changed")

USE_WITHOUT_NORM = _cause(
    "use-without-norm",
    "not every use of it has a norm of its own right {side} it that can go: see {place}",
    "Untying gives each use of a shared layer a copy of its own in the place of the norm beside it, and the layer "
    "itself becomes the identity. So each use needs such a norm, with nothing and nobody between the two.",
    "Nothing; or build the model with a layer for each use.",
)
NORM_ALSO_ELSEWHERE = _cause(
    "norm-also-elsewhere",
    "{norm}, a norm beside it, also normalises something else",
    "The layer would be put in the place of the norm, and run there on what never was given to it.",
    "Nothing; or build the model with a norm for each use.",
)
LAYER_HAS_HOOK = _cause(
    "layer-has-hook",
    "a forward hook sees what it is given and makes",
    "The hook belongs to a layer that would be another one, or see something else.",
    "Remove the hook before fusing.",
)
LAYER_IS_OTHER = _cause(
    "layer-is-other",
    "{kind} is not one of PyTorch's convolutions and linear layers, or runs a forward of its own",
    "Only a layer of PyTorch's can be made anew with the same settings.",
    "Nothing; `restructure='bake'` makes such a layer of one that only computes its weight.",
)
LAYER_DIFFERS = _cause(
    "layer-differs",
    "it is another layer from one call to the next",
    "Its stride, padding or another setting, or its weight, depends on how it is called.",
    "Nothing.",
)
LAYER_IS_LOOKED_AT = _cause(
    "layer-is-looked-at",
    "with another module in its place the code around it does something else",
    "The restructured model failed or gave something else, since the code reads an attribute or the class of a layer "
    "or norm, or holds it in a place of its own.",
    "Call the layer and do nothing else with it.",
)
WEIGHT_COMPUTED_AMID_OTHER_WORK = _cause(
    "weight-computed-amid-other-work",
    "its forward does more than computing the weight of one layer and running it",
    "Code cannot be changed, only modules: a module whose forward is one layer with a computed weight becomes that "
    "layer with the result.",
    "Move the layer and its weight into a module of their own.",
)
GAINS_NOTHING = _cause(
    "gains-nothing",
    "no norm goes with it that would stay without",
    "Each use would cost a copy of the weights, and the norms behind them stay all the same.",
    "Nothing.",
)
CLIP_TAKES_LONGER = _cause(
    "clip-takes-longer",
    "two bounds and an addition would take longer than the norm and its activation",
    "Some scales are negative, or the activation has two bounds, and what comes next takes no shift, as a layer that "
    "pads with zeros.",
    "Nothing.",
)
COSTS_NORMS = _cause(
    "costs-norms",
    "with it norms stay that go without it",
    "A norm that folds into the layers as they are, or through them, finds no way through the one that would take "
    "their place: that pads, say, and takes no shift.",
    "Nothing.",
)
LOADS_WITHOUT_A_WORD = _cause(
    "loads-without-a-word",
    "the library that keeps the model in a folder would load a file of the new one into the old one without a word",
    "transformers and `PyTorchModelHubMixin` are lenient about names. What stands in the place of a norm has a tensor "
    "that keeps them from it, and no norm goes here.",
    "Nothing; or bake the weights yourself.",
)
BLOCK_DOES_MORE = _cause(
    "block-does-more",
    "its forward does more than to add up branches that read one tensor",
    "A block is replaced as a whole, so all that it does must be its branches, their sum, and children or activations "
    "before and after it.",
    "Move the branches and their sum into a module of their own.",
)
BLOCK_IS_SHARED = _cause(
    "block-is-shared",
    "{place} also serves something else, or did not run",
    "A part of what would become one layer is also called or held elsewhere, or its parameter is tied to another one, "
    "or was not read by any call.",
    "Nothing; or build the model with a copy of it for each use.",
)
