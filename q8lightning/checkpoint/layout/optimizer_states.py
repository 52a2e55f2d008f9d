"""Know what optimizers remember: a table of the keys of their states, with what each holds and why it is stored so.

A new optimizer is a row for each of its keys. The presets make their rules of the rows, and the guard goes by them.
docs/optimizers.md has what each decision costs.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

FIRST = "a first moment"
"""Signed, and most values are small beside the largest: ``softsign``."""

SECOND = "a second moment"
"""Never negative, over many orders of magnitude, in the denominator of the step: ``log``. What is not zero stays so."""

WEIGHTS = "weights"
"""A second set of the model's weights: the codec of weights."""

EXACT = "exact"
"""Stored as it is."""


class State(NamedTuple):
    """A state that optimizers keep for a parameter.

    Attributes:
        holds: :data:`FIRST`, :data:`SECOND`, :data:`WEIGHTS` or :data:`EXACT`.
        of: The optimizers that have it.
        why: Why it is stored as it is, if it is or may be.
        unless: An option of the optimizer's group under which the state is exact, whatever it holds.
    """

    holds: str
    of: str
    why: str = ""
    unless: str = ""


_SMALL = "a value for each row or column"
_HISTORY = "curvature is the difference of two entries, and rounding it spoils all later steps"
_SCALES = "scales of states that the optimizer has quantized itself"

STATES: Mapping[str, State] = MappingProxyType(
    {
        "exp_avg": State(FIRST, "Adam, AdamW, NAdam, RAdam, Adamax, SparseAdam, Lion, SOAP"),
        "momentum_buffer": State(FIRST, "SGD, RMSprop, Muon"),
        "exp_avg_sq": State(SECOND, "Adam, AdamW, NAdam, RAdam, SparseAdam, SOAP, schedule-free AdamW"),
        "max_exp_avg_sq": State(SECOND, "Adam and AdamW with amsgrad"),
        "square_avg": State(
            SECOND,
            "RMSprop, Adadelta",
            "RMSprop(centered=True) takes the root of square_avg - grad_avg², which rounding can make negative",
            unless="centered",
        ),
        "sum": State(SECOND, "Adagrad"),
        "acc_delta": State(SECOND, "Adadelta"),
        "exp_inf": State(SECOND, "Adamax"),
        "variance": State(SECOND, "Adafactor, of vectors"),
        "ax": State(WEIGHTS, "ASGD"),
        "z": State(WEIGHTS, "schedule-free optimizers"),
        "grad_avg": State(EXACT, "RMSprop with centered", "its square is subtracted from square_avg"),
        "row_var": State(EXACT, "Adafactor", _SMALL),
        "col_var": State(EXACT, "Adafactor", _SMALL),
        "exp_avg_sq_row": State(EXACT, "the Adafactor of transformers", _SMALL),
        "exp_avg_sq_col": State(EXACT, "the Adafactor of transformers", _SMALL),
        "prev": State(EXACT, "Rprop", "only its sign counts, and a small value that became zero would have none"),
        "step_size": State(EXACT, "Rprop", "each value is the step itself, reached by exact factors"),
        "d": State(EXACT, "LBFGS", _HISTORY),
        "prev_flat_grad": State(EXACT, "LBFGS", _HISTORY),
        "old_dirs": State(EXACT, "LBFGS", _HISTORY),
        "old_stps": State(EXACT, "LBFGS", _HISTORY),
        "GG": State(EXACT, "SOAP", "its smallest eigenvalues decide as much as the largest, and rounding covers them"),
        "Q": State(EXACT, "SOAP", "its columns are orthogonal, and second moments are in their coordinates"),
        "absmax[12]": State(EXACT, "optimizers of bitsandbytes", _SCALES),
        "qmap[12]": State(EXACT, "optimizers of bitsandbytes", "levels of states that are quantized already"),
        "*::scales": State(EXACT, "FlashOptim", _SCALES),
        "error_bits": State(EXACT, "FlashOptim", "bits of the weights, which only look like floats"),
    }
)
"""The states that are known, by their keys; a key with wildcards stands for several."""


def _keys_of(kind: str) -> tuple[str, ...]:
    return tuple(key for key, state in STATES.items() if state.holds == kind)


FIRST_MOMENTS = _keys_of(FIRST)
SECOND_MOMENTS = _keys_of(SECOND)
OTHER_WEIGHTS = _keys_of(WEIGHTS)
"""The keys of states by what they hold. All of these have the shape of their parameter."""

FIRST_OF_ADAM = "exp_avg"
SECONDS_OF_ADAM = ("max_exp_avg_sq", "exp_avg_sq")
"""Keys of the moments of Adam and similar optimizers. The optimizer steps by the first of the second moments that
exists: AMSGrad keeps the largest so far beside the one that it updates."""

BASES = ("Q", "GG")
"""Keys that say that second moments are in coordinates of their own, so that their elements are not those of the first
moment."""


def moments_of(path: str) -> list[str]:
    """Return the paths of all moments of an update direction, from the path of the first moment."""
    state = path.removesuffix(FIRST_OF_ADAM)
    return [path, *(f"{state}{key}" for key in SECONDS_OF_ADAM)]


def is_exact(keys: Sequence[object]) -> bool:
    """Whether a state is known to be stored as it is.

    Args:
        keys: The keys from the parameter's states on, such as ``("GG", 0)`` for a matrix in a list.
    """
    return any(state_of(str(key)).holds == EXACT for key in keys)


def state_of(key: str) -> State:
    """Return what is known of a state, :data:`UNKNOWN` if nothing is."""
    if (found := STATES.get(key)) is not None:
        return found
    return next((state for pattern, state in STATES.items() if fnmatchcase(key, pattern)), UNKNOWN)


UNKNOWN = State("", "", "no rule of the policy names it")
