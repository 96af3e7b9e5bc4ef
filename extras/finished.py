"""Add to finished runs what only the tables need: ham.py does not measure it.

    python -m extras.finished results/cifar100-T20-ham-i50-s1993 --data-dir data --weights FILE

task_known_accuracy  the arg max over the true task's classes only
head_accuracy        by the rows that were trained with the tasks, instead of class means
class_mean_oracle    class means of all training images under the final model: never a result

The run's state.pt must still lie beside its results.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

import ham
from extras import baselines


def measure(vit, method, data, class_rows):
    """-> three entries of results.json. class_rows: dict read-out: (C, D)"""
    config, every, weights = method.config, range(len(data.names)), method.folded()
    features, labels = ham.extract(vit, weights, data, "test", every, config)
    oracle = ham.class_means(*ham.extract(vit, weights, data, "train", every, config), every)
    logits = {k: ham.cosine_logits(features, x) for k, x in (class_rows | {"": oracle}).items()}
    oracle = 100 * (logits[""].argmax(1) == labels).double().mean().item()
    found = baselines.by_head_and_task(logits, labels, data.tasks, config.read_out)
    if config.method in ("frozen", "first"):  # have none, or the first task's
        found["head_accuracy"] = None
    return found | {"class_mean_oracle": oracle}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--weights")
    args = parser.parse_args()
    for folder in args.folders:
        if missing := {"results.json", "state.pt"} - {file.name for file in folder.glob("*")}:
            parser.error(f"{folder}: no {' and no '.join(sorted(missing))} of a finished run")
        results = json.loads((folder / "results.json").read_text("utf-8"))
        if "head_accuracy" in results:  # also where a method's own loop measures it
            continue
        names = {f.name for f in dataclasses.fields(baselines.Config)}
        config = baselines.Config(**{k: x for k, x in results["config"].items() if k in names})
        given = {"data_dir": args.data_dir, "weights": args.weights, "device": None}
        vit, method, data, _ = baselines.prepare(dataclasses.replace(config, **given))
        state = torch.load(folder / "state.pt", data.device, weights_only=True)
        method.restore(state["method"])
        results |= measure(vit, method, data, state["class_rows"])
        text = json.dumps(results, indent=1) + "\n"
        ham.write(folder / "results.json", lambda f, text=text: f.write(text.encode()))


if __name__ == "__main__":
    main()
