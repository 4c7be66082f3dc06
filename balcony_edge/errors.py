"""Every error that Balcony Edge raises on purpose.

Form of a message: what was given, what is allowed, what to do. The CLI prints that one line and exits 1. It does
the same where memory runs out, a file cannot be used or a package of the workstation is absent
(:func:`balcony_edge.cli.reported`); any other exception is a bug and keeps its traceback.
"""

import errno


class BalconyError(Exception):
    """Base of the tree: a problem that its one-line message explains to the user."""


class BundleError(BalconyError):
    """A bundle is missing, damaged, of another version, or differs from its manifest."""


class CheckpointError(BalconyError):
    """A model directory or a set of balconies cannot be read or does not fit."""


class UnsupportedModelError(CheckpointError):
    """The exporter refuses this architecture; the message names what it cannot represent."""


class EngineBuildError(BalconyError):
    """TensorRT cannot read a graph or build an engine from it."""


class BudgetError(BalconyError):
    """A target is out of range or contradicts another."""


class InfeasibleError(BudgetError):
    """Nothing meets the budget and its ``on_infeasible`` is ``error``, or its ``critical_temperature_c`` is reached."""


class BusyError(BalconyError):
    """The replies in progress leave no time, memory or place for another one; a later try may succeed."""


class ProfileError(BalconyError):
    """A device profile cannot be measured, read or written."""


class ContextLengthError(BalconyError):
    """A prompt or a reply needs more tokens than the context holds."""


class InputError(BalconyError):
    """A prompt, a sampling parameter, an exit or a path cannot be used."""


class TrainingError(BalconyError):
    """A training run cannot start, or must stop; the last good checkpoint is kept."""


class VerificationError(BalconyError):
    """Outputs differ from the reference by more than the stated bound."""


class DeviceError(BalconyError):
    """A device is missing, fails, refuses its input, or does not have enough memory."""


class MissingDependencyError(BalconyError):
    """A package that this action needs is not installed; the message names the cure."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out. PyTorch's CPU allocator raises a plain RuntimeError, ONNX Runtime classes of its own."""
    if isinstance(error, OSError):  # such as that of a file that cannot be mapped
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ["out of memory", "can't allocate memory", "not enough memory", "failed to allocate memory"]
    words += ["bad_alloc", "bad allocation"]  # of C++; the second is that of Windows
    words += ["alloc_failed"]  # CUBLAS_STATUS_ALLOC_FAILED, and that of cuDNN
    return any(part in str(error).lower() for part in words)


def shown(value: object) -> str:
    """A value as a message shows it: on one line of bounded length."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())  # an array has several
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"{type(value).__name__} with a number that is too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."
