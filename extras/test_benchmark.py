"""Tests of extras/benchmark.py at tiny size: that it times what it says."""

import sys

import pytest
import torch

for name in ("pandas", "peft", "tabulate"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from extras import benchmark


@pytest.fixture
def bench(monkeypatch):
    args = ["", "--model", "test_vit", "--img-size", "32", "--rounds", "1", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*args, "--batch-size", "4", "--device", "cpu"])
    return benchmark.Bench(benchmark.arguments())


def test_all_tables_are_made(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.main()
    (file,) = tmp_path.iterdir()
    text = file.read_text("utf-8")
    for row in ("bare", "HAM, 10 groups", "PEFT, 50 adapters", " 100 |", "PEFT and DataLoader"):
        assert row in text, row


def test_adapters_of_peft_are_all_active_and_the_last_is_trained(bench):
    model = bench.peft_model(3, fused=False)
    loras = [x for n, x in model.named_parameters() if "lora_B" in n]
    assert sum(x.requires_grad for x in loras) == len(loras) / 3
    with torch.no_grad():
        before = model(bench.x)
        for k in range(3):
            for name, x in model.named_parameters():
                if f"lora_B.{k}." in name:
                    x.fill_(0.1)
            after = model(bench.x)
            assert not torch.allclose(after, before, atol=1e-4)
            before = after
