"""What a program's own process does inside a sandbox: run the source as __main__, call its function.

Sent to the sandbox as code, as sandbox_init.py is; imports the standard library alone. Whatever it writes
to descriptor 3 the program could have written itself: the host takes it for the program's word.
Next: bubblewrap.py, the host's side.
"""

import atexit
import contextlib
import json
import os
import sys
import types
from typing import Any

_REPORT = 3
_PLAIN = (bool, int, float, str, type(None))


def run(source: str, call: dict[str, Any] | None) -> int:
    """Run the source, then the call; the exit code is what Python's own would be."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    code = 0
    try:
        exec(compile(source, "main.py", "exec"), module.__dict__)
        if call is not None:
            function = _find(module, call["function"])
            _report(_value(function(*call["args"], **call["kwargs"])))
    except SystemExit as stop:
        code = _exit_code(stop.code)
    except BaseException as error:
        code = 1
        _report({"exception": type(error).__name__})
        _show(error, source)
    with contextlib.suppress(BaseException):  # as Python's own end does
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return code


def _find(module: types.ModuleType, name: str) -> Any:
    """The object of a dotted name: in the source, or in a module that can be imported."""
    first, *rest = name.split(".")
    found = getattr(module, first) if hasattr(module, first) else __import__(first)
    path = first
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part):
            __import__(path)
        found = getattr(found, part)
    return found


def _value(value: Any) -> dict[str, Any]:
    try:
        return {"value": _plain(value)}
    except (TypeError, RecursionError) as error:
        return {"exception": type(error).__name__, "why": str(error)}


def _plain(value: Any) -> Any:
    """The value as JSON holds it; TypeError for anything else. Subclasses may lie and are something else."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return [_plain(item) for item in value]
    if kind is dict:
        keys = {type(key) for key in value}
        if keys <= {str, int}:
            return {str(key): _plain(item) for key, item in value.items()}
    raise TypeError(f"the call returned {kind.__name__}, not plain data")


def _report(content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        data = memoryview(json.dumps(content).encode())
        while data:
            data = data[os.write(_REPORT, data) :]


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _show(error: BaseException, source: str) -> None:
    """The traceback as Python prints it, our own frame left out."""
    import linecache  # a program that does not fail needs neither
    import traceback

    linecache.cache["main.py"] = (len(source), None, source.splitlines(keepends=True), "main.py")
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    with contextlib.suppress(BaseException):
        traceback.print_exception(type(error), error, frames)
