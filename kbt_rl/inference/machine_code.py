"""Whether there is machine code (numba), and what to say where there is none."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import SimpleNamespace


@lru_cache(maxsize=1)
def kernels() -> SimpleNamespace | None:
    """The modules of machine code by name, or None; says once why there is none.

    numba is an extra (``pip install "kbt_rl[fast]"``). Without it, with its ``NUMBA_DISABLE_JIT``, or where it does not
    work, everything goes by the definition.
    """
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name != "numba":
            _unusable(error)
            return None
        warnings.warn(
            'numba is not installed, so updates take several times as long; pip install "kbt_rl[fast]"', stacklevel=2
        )
        return None
    except Exception as error:  # a numba that is broken in whatever way is as none
        _unusable(error)
        return None
    if numba.config.DISABLE_JIT:
        return None
    try:
        from kbt_rl.inference.kernels import average, classes, outputs, relu, roots, small
    except Exception as error:
        _unusable(error)
        return None
    return SimpleNamespace(average=average, classes=classes, outputs=outputs, relu=relu, roots=roots, small=small)


def _unusable(error: Exception) -> None:
    warnings.warn(
        f"numba cannot be used ({type(error).__name__}: {error}), so updates take several times as long; reinstall or "
        "remove it",
        stacklevel=3,
    )
