"""Notebooks: cells are the pages' blocks, and they run."""

import sys

import pytest

# Where it is missing, test_docs.py runs these pages as it runs all others.
pytest.importorskip("nbclient", reason="needs the extra test as it is now")

import nbformat  # noqa: E402
from jupyter_client.manager import KernelManager  # noqa: E402
from make_notebooks import TUTORIALS, main, make_notebook, read_pages  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

PAGE = """# One

See [two](two.md#part) and [far](https://example.org).

```python
a = 1

b = 2
```

```bash
ls
```

<!-- compiled only: this needs the Hub -->
```python
c
```

1. A list:

    ```python
    d = a
    ```
"""


def test_blocks_become_cells():
    notebook = make_notebook([PAGE, "# Two\n"])
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        ("markdown", "# One\n\nSee two and [far](https://example.org)."),
        ("code", "a = 1\n\nb = 2"),
        ("markdown", "```bash\nls\n```\n\n```python\nc\n```\n\n1. A list:"),
        ("code", "d = a"),
        ("markdown", "# Two"),
    ]
    assert notebook == make_notebook([PAGE, "# Two\n"]), "twice the same, ids included"


def test_notebooks_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_notebooks.py", "--output", str(tmp_path / "made")])
    main()
    written = sorted((tmp_path / "made").iterdir())
    assert [path.stem for path in written] == sorted(TUTORIALS)
    assert capsys.readouterr().out.count(".ipynb") == len(written)
    for path in written:
        cells = nbformat.read(path, as_version=4).cells
        assert sum(cell.cell_type == "code" for cell in cells) >= 3
        assert "](" not in "".join(cell.source for cell in cells if cell.cell_type == "markdown").replace("](http", "")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks: its start, and the imports, take most of the time."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_run(name, kernel):
    """Cell by cell, in a namespace that holds nothing of the notebook before."""
    notebook = make_notebook(read_pages(name))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=300).execute(reset_kc=True)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
