"""The emulated library for the tests that run on it, built where it is missing."""

import functools
import os

from rnnfast import libraries, ops


@functools.cache
def emulated_problem() -> str | None:
    """Loads the library, built first where it is missing; why that is impossible, None where it went well."""
    path = os.environ.get(libraries.EMULATED_VARIABLE)
    if not path:
        try:
            import build_emulated
        except ImportError as error:
            return f"tests/build_emulated.py cannot be imported: {error}"
        path = str(build_emulated.LIBRARY)
        if not os.path.exists(path) and not build_emulated.build(["library"], quiet=True):
            return "the emulated library does not build: see `python tests/build_emulated.py library`"
    try:
        ops.load_emulated(path)
    except RuntimeError as error:
        return str(error)
    return None
