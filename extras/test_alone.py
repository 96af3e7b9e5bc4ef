"""Tests of extras/alone.py, on drawn images: nothing to download."""

import dataclasses
import json

import pytest
import torch

import ham
from extras import alone
from extras.test_baselines import config, folder  # noqa: F401 fixtures


def vectors(*rows):
    return [torch.tensor(row) for row in rows]


def test_a_task_joins_the_group_whose_members_are_most_similar_not_the_largest():
    """By the cosine with a group's mean the last would join the first group: 0.67 against 0.53."""
    first = [0.6, 0.0, 0.8, 0.0, 0.0], [0.6, 0.0, 0.0, 0.8, 0.0], [0.6, 0.0, 0.0, 0.0, 0.8]
    second = [0.0, 1.0, 0.0, 0.0, 0.0]
    given = vectors(first[0], second, *first[1:], [0.85, 0.53, 0.0, 0.0, 0.0], first[0])
    assert alone.group(given, 2) == [0, 1, 0, 0, 1, 1]  # the last: the first group is full


def test_another_draw_has_the_same_sizes():
    places = [0, 1, 2, 0, 0, 0, 1, 2, 2, 0]
    drawn = [alone.shuffled(places, 3, (1993, draw)) for draw in range(5)]
    assert all(x[:3] == [0, 1, 2] and sorted(x) == sorted(places) for x in drawn)
    assert len({tuple(x) for x in drawn}) > 1


def test_in_one_group_they_are_average_and_without_weight_frozen(config, tmp_path, monkeypatch):  # noqa: F811
    """Not by accuracies of 18 images: by the class means that they come from."""
    means, real = [], ham.class_means

    def class_means(*given, unit=True):
        found = real(*given, unit)
        means.extend([found] if unit else [])  # not where a head starts
        return found

    def rows():
        taken = torch.cat(means)
        means.clear()
        return taken

    monkeypatch.setattr(ham, "class_means", class_means)
    common = {"out": str(tmp_path), "lr": 1e-2}
    given = dataclasses.asdict(config(g_max=1, rho=1.0, **common))
    given = alone.Config(**given | {"ranks": "24", "by": "adapter"})
    ham.run(config(method="average", **common))
    average = rows()
    for _ in range(2):  # the second trains nothing
        alone.run(given)
        torch.testing.assert_close(rows(), average)
        monkeypatch.setattr(alone, "train", None)
    ham.run(config(method="frozen", out=str(tmp_path)))
    frozen = rows()
    alone.run(dataclasses.replace(given, scales="0"))
    torch.testing.assert_close(rows(), frozen)
    assert (frozen - average).abs().max() > 0.01
    lines = (tmp_path / "alone.jsonl").read_text().splitlines()
    assert [json.loads(x)["scale"] for x in lines] == [1, 1, 0]


@pytest.mark.parametrize(
    "mistake",
    [
        {"ranks": "2,x"},
        {"ranks": "0"},
        {"by": "gradients"},
        {"merge": "sum"},
        {"group_rank": 2},
        {"lr": None},
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(mistake, config):  # noqa: F811
    given = dataclasses.asdict(config(lr=1e-2)) | mistake
    with pytest.raises(
        ham.InputError, match="--merge|--group-rank|numbers|must be of|give|at least"
    ):
        alone.run(alone.Config(**given))
