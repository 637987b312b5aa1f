"""The notebook runs from a clean kernel, wherever it is started, and the copy on disk is the result of such a run."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "kv_cache.ipynb"


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """
    A function that runs a notebook in memory, in a fresh kernel of this Python, and returns its outputs; the file on
    disk stays as it is. It raises on the first cell that fails. Neither the user's start-up files nor our own path help.
    """
    for module in ("ipykernel", "nbclient", "matplotlib"):
        pytest.importorskip(module, reason=f"a notebook needs {module} to run: pip install -e .[notebooks]")
    import nbclient
    import nbformat

    for name in ("PYTHONPATH", "MPLBACKEND"):  # a backend that is already chosen would keep the figures to itself
        monkeypatch.delenv(name, raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # "python3" means this environment's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(folder, n_code_cells=None):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:n_code_cells]
        for cell in notebook.cells:
            cell.outputs = []
        where = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
        return [output for cell in notebook.cells for output in cell.outputs]

    return run


def figures(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]


def text(outputs):
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_the_notebook_runs_from_a_clean_kernel_draws_its_figures_and_finds_the_cache_faster(execute):
    outputs = execute(NOTEBOOK.parent)  # where Jupyter starts a notebook's kernel
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(figures(outputs)) == 3
    assert "318 numbers agree" in text(outputs)
    ratios = [float(ratio) for ratio in re.findall(r"ratio +([\d.]+)", text(outputs))]
    assert len(ratios) == 2 and min(ratios) > 1  # about 4 where nothing else runs


def test_the_notebook_finds_the_modules_from_the_repository_root_too(execute):
    execute(ROOT, n_code_cells=1)


def test_the_notebook_on_disk_was_run_in_order_without_error_is_small_and_names_no_machine():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warning
    assert len(figures(outputs)) == 3
    assert len(notebook["cells"]) <= 25 and NOTEBOOK.stat().st_size < 400_000
    assert notebook["metadata"] == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                    "language_info": {"name": "python"}}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    for figure in figures(outputs):
        del figure["data"]["image/png"]  # its letters are no words
    assert not re.search(r"/(home|root|Users|tmp|work|usr|opt)/|[A-Z]:\\\\", json.dumps(notebook))
