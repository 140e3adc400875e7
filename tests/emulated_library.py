"""The emulated library for the tests that run on it, brought up to date first."""

import functools
import os

from rnnfast import libraries
from rnnfast.registration import load_emulated


@functools.cache
def emulated_problem() -> str | None:
    """Loads the library, built first; why that is impossible, None where it went well."""
    path = os.environ.get(libraries.EMULATED_VARIABLE)
    if not path:
        try:
            import build_emulated
        except ImportError as error:
            return f"tests/build_emulated.py cannot be imported: {error}"
        path = str(build_emulated.LIBRARY)
        try:
            built = build_emulated.build(["library"], quiet=True)
        except SystemExit as error:  # no compiler, or no ninja
            return str(error)
        if not built:
            raise RuntimeError("the emulated library does not compile: see `python tests/build_emulated.py library`")
    try:
        load_emulated(path)
    except RuntimeError as error:
        return str(error)
    return None
