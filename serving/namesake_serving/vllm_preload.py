"""vLLM's server, imported before it is known what it serves: ``python -m namesake_serving.vllm_preload MODULE``.

Importing it takes seconds, in which the registry can be asked and the version fetched and checked. The command line
then comes as a line of JSON; where none comes, nobody needs the server.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys


def main(module: str) -> None:
    """Import the module, read the command line, and run it as ``python -m MODULE`` would."""
    importlib.import_module(module)
    del sys.modules[module]  # what it imports stays; the module itself is run as the main one
    line = sys.stdin.readline()
    if not line:
        return
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.argv = [module, *json.loads(line)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
