import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# also for the processes that tests start
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
torch.set_num_threads(1)


@pytest.fixture
def count_graphs(monkeypatch):
    """A list of the graphs that torch.compile makes. All of it is real but its last stage, the
    C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_without_cpp(function, **options):
        return compiler(function, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", compile_without_cpp)
    yield graphs
    torch.compiler.reset()
