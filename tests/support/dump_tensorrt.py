"""Print the classes, members, docstrings and constants of the real TensorRT binding as JSON."""

import inspect
import json
import sys

import tensorrt_bindings as trt


def enum(kind):
    return {name: int(member) for name, member in kind.__members__.items()}


classes, enums, constants = {}, {}, []
for name in dir(trt):
    thing = getattr(trt, name)
    if not inspect.isclass(thing):
        constants.append(name)
        continue
    if hasattr(thing, "__members__"):
        enums[name] = enum(thing)
        continue
    members = {}
    for member in dir(thing):
        if member.startswith("_") and member != "__init__":
            continue
        static = inspect.getattr_static(thing, member)
        if isinstance(static, property):
            doc = static.fget.__doc__ or ""
            members[member] = {"doc": doc, "writable": static.fset is not None, "kind": "property"}
        elif inspect.isclass(getattr(thing, member)) and hasattr(getattr(thing, member), "__members__"):
            enums[name + "." + member] = enum(getattr(thing, member))
        elif callable(getattr(thing, member)):
            members[member] = {"doc": getattr(thing, member).__doc__ or "", "kind": "method"}
        else:
            members[member] = {"kind": "constant", "value": int(static)}
    classes[name] = {"bases": [base.__name__ for base in thing.__mro__], "members": members}
json.dump({"version": trt.__version__, "classes": classes, "enums": enums, "constants": constants}, sys.stdout)
