"""Executes ``tour.ipynb`` anew, every cell for real (some minutes): ``python examples/execute.py``.

What libraries say on standard error is left out: it has paths of the machine, and nothing about Namesake.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).with_name("tour.ipynb")


def main() -> None:
    """Execute the notebook with a tracking store of its own, and write it with its outputs."""
    notebook = nbformat.read(TOUR, as_version=4)
    with tempfile.TemporaryDirectory(prefix="namesake-tour-") as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            on_cell_executed=lambda cell, cell_index, execute_reply: print(f"  cell {cell_index} done", flush=True),
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, TOUR)


if __name__ == "__main__":
    main()
