"""The ranks section of the GPU benchmark, rehearsed on a CPU; and, where there are GPUs, a run with NCCL."""

import importlib
import pathlib
import sys

import pytest
import torch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def section(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "gpu_ranks", raising=False)
    return importlib.import_module("gpu_ranks")


def test_it_is_rehearsed_on_a_cpu(section, capsys):
    assert section.main(["--smoke", "--models", "perceptron", "--estimators", "unrolled"]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.partition("\n\n")[2].splitlines() if line.startswith("| perceptron")]
    assert [row.split(" | ")[2] for row in rows] == ["1", "2"]
    for row in rows:
        memory, sent, status = row.removesuffix(" |").split(" | ")[-3:]
        assert status.strip() == "OK", shown
        for figure in (memory, sent):
            real, _, wanted = figure.partition(" (")
            assert wanted == f"{real})"  # the forecast's


def test_it_says_what_it_needs(section, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert section.main([]) == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.mark.cuda
def test_ranks_on_gpus(section):
    count = torch.cuda.device_count()
    real, wanted = section.cell("perceptron", "unrolled", "cuda", count)
    assert (real.status, real.processes) == ("OK", count)
    assert (real.sent_bytes, real.collectives) == (wanted.sent_bytes, wanted.collectives)
    assert real.collective_seconds > 0
