"""Tests of extras/lift: each file, in its framework or a stand-in, does what ham.py does.

The stand-ins of mammoth and PILOT have just what the files touch. Two tasks of two classes, drawn
images, a small ViT; training images are flipped, those for class means are not.
"""

import argparse
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, Dataset

import ham

LIFT = Path(__file__).parent / "lift"
TASKS, CLASSES = [range(2), range(2, 4)], 4
CONFIG = ham.Config(epochs=2, batch_size=8, seed=3, rank=2, precision="fp32", device="cpu")
CFG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


class Data(ham.Data):
    def prepare(self, pixels, flip=None):
        """Every training image is flipped: a file that forgets to switch transforms is found."""
        return super().prepare(pixels, None if flip is None else torch.ones(len(pixels)).bool())


@pytest.fixture(scope="module")
def data():
    random, pixels, labels = torch.Generator().manual_seed(0), {}, {}
    for part, n in (("train", 10), ("test", 6)):
        labels[part] = torch.arange(CLASSES).repeat_interleave(n)
        colours = torch.linspace(0, 200, CLASSES)[labels[part], None, None, None]
        noise = torch.randint(0, 56, (n * CLASSES, 3, 32, 32), generator=random)
        pixels[part] = (colours * (torch.rand(32, generator=random) > 0.3) + noise).byte()
    return Data(pixels, labels, [*"abcd"], TASKS, CFG, "cpu")


def build_vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=0).eval()


@pytest.fixture(scope="module")
def expected(data):
    """-> per task what `finish` says, and accuracies over the classes seen so far"""
    vit, records, matrix, rows = build_vit().requires_grad_(False), [], [], torch.zeros(CLASSES, 64)
    method = ham.HAM(ham.lora_layers(vit, CONFIG.layers), CONFIG)
    for task, classes in enumerate(TASKS):
        trained, _ = ham.train_task(vit, method, data, task)
        records.append(method.finish(task, trained))
        train = ham.extract(vit, method.folded(), data, "train", classes, CONFIG)
        rows[list(classes)] = ham.class_means(*train, classes)
        seen = range(classes[-1] + 1)
        features, labels = ham.extract(vit, method.folded(), data, "test", seen, CONFIG)
        logits = ham.cosine_logits(features, rows[: len(seen)])
        matrix.append(ham.accuracies(logits, labels, TASKS[: task + 1]))
    assert records[1]["similarities"] and records[0]["alpha"] != 1
    return records, matrix


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["group"] == other["group"] and one["group_sizes"] == other["group_sizes"]
        for name in ("alpha", "alpha_groups", "similarities"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)


def batches(n, task):
    """The rows of each batch of each epoch, as `train_task` draws them."""
    random = torch.Generator().manual_seed(1000 * CONFIG.seed + task)
    for _ in range(CONFIG.epochs):
        epoch = torch.randperm(n, generator=random).split(CONFIG.batch_size)
        for rows in epoch:
            torch.rand(len(rows), generator=random)  # its flips
        yield [rows.tolist() for rows in epoch]


class Epochs:
    """A batch sampler: another epoch of ham.py's each time."""

    def __init__(self, n, task):
        self.epochs = [*batches(n, task)]
        self.left = iter(self.epochs)

    def __len__(self):
        return len(self.epochs[0])

    def __iter__(self):
        return iter(next(self.left))


def plain(data):
    return lambda x: data.prepare(x[None])[0]


def flipped(data):
    return lambda x: data.prepare(x[None], flip=True)[0]


class Images(Dataset):
    def __init__(self, data, part, classes, transform):
        self.pixels, self.targets = data.images(part, classes)
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        x = self.transform(self.pixels[i])
        return x, self.targets[i], x


def load(name, monkeypatch, **modules):
    """A file of extras/lift among the modules that it imports. -> module"""
    for path, content in modules.items():
        monkeypatch.setitem(sys.modules, path.replace("__", "."), content)
    spec = importlib.util.spec_from_file_location(f"lifted_{name}", LIFT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module(**content):
    return types.SimpleNamespace(**content)


# ----------------------------------------------------------------------------------------- mammoth


class ContinualModel(torch.nn.Module):
    """What mammoth's does around the hooks."""

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__()
        self.net, self.args, self.num_classes, self.device = backbone, args, CLASSES, "cpu"
        self.current_task = 0

    def train_task(self, dataset):
        self.net.train()
        self.task_iteration, task = 0, TASKS[self.current_task]
        self.n_past_classes, self.n_seen_classes = task[0], task[-1] + 1
        self.opt = torch.optim.SGD(self.net.parameters(), lr=self.args.lr)
        self.begin_task(dataset)
        for _ in range(self.args.n_epochs):
            for inputs, labels, plain in dataset.train_loader:
                assert self.observe(inputs, labels, plain) > 0
                self.task_iteration += 1
        self.end_task(dataset)
        self.current_task += 1


class Sequential(torch.nn.Module):
    """A backbone as mammoth's, with a head."""

    def __init__(self):
        super().__init__()
        self.vit, self.head, self.feature_dim = build_vit(), torch.nn.Linear(64, CLASSES), 64

    def forward(self, x):
        return self.head(self.vit(x))


@pytest.fixture
def mammoth(monkeypatch):
    """-> function: arguments -> the model"""
    package, base = module(ham=ham), module(ContinualModel=ContinualModel)
    names = {"models": module(), "models__ham_utils": package, "models__utils": module()}
    names["models__utils__continual_model"] = base
    lifted = load("mammoth", monkeypatch, **names)

    def build(*given):
        parser = argparse.ArgumentParser()
        for name, kind in (("lr_scheduler", str), ("lr", float), ("batch_size", int)):
            parser.add_argument(f"--{name}", type=kind)
        parser.add_argument("--fitting_mode", default="epochs")
        lifted.Ham.get_parser(parser).set_defaults(seed=CONFIG.seed, distributed="no")
        parser.set_defaults(n_epochs=CONFIG.epochs)
        return lifted.Ham(Sequential(), None, parser.parse_args(given), None)

    return build


def run_mammoth(model, data, first=0):
    """mammoth's loop. -> accuracies per task"""
    matrix, tests = [], [Images(data, "test", task, plain(data)) for task in TASKS]
    augment = flipped(data)
    for task in range(first, len(TASKS)):
        images = Images(data, "train", TASKS[task], augment)
        sampler = Epochs(len(images), task)
        loader = DataLoader(images, batch_sampler=sampler)
        loaders = [DataLoader(images, 128) for images in tests[: task + 1]]
        model.train_task(types.SimpleNamespace(train_loader=loader, test_loaders=loaders))
        assert images.transform is augment
        model.eval()
        with torch.no_grad():
            rows = [[(model(x), y) for x, y, _ in loader] for loader in loaders]
        matrix.append([100 * (z.argmax(1) == y).double().mean().item() for ((z, y),) in rows])
    return matrix


def test_mammoth(mammoth, data, expected, monkeypatch):
    model, records = mammoth("--rank", "2", "--group_rank", "4"), []
    finish = model.method.finish
    model.method.finish = lambda *given: records.append(finish(*given)) or records[-1]
    assert run_mammoth(model, data) == [pytest.approx(row) for row in expected[1]]
    same(records, expected[0])
    assert not any(x.requires_grad for x in model.parameters())
    assert model.config.group_rank == 4


def test_mammoth_goes_on_from_a_checkpoint(mammoth, data, tmp_path):
    """Saved after the first task; one that is not trained changes nothing."""
    whole, half, rest = mammoth(), mammoth(), mammoth("--rank", "8")
    matrix = run_mammoth(whole, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TASKS", TASKS[:1])
        run_mammoth(half, data)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    rest.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest.current_task = 1
    assert run_mammoth(rest, data, first=1) == matrix[1:]
    groups = [(g.alpha, g.members) for g in rest.method.groups]
    assert groups == [(g.alpha, g.members) for g in whole.method.groups]
    rest.task_iteration = 0
    rest.end_task(None)
    assert groups == [(g.alpha, g.members) for g in rest.method.groups]


def test_mammoth_refuses_what_would_not_train(mammoth):
    for given in (["--lr_scheduler", "cosine"], ["--fitting_mode", "iters"]):
        with pytest.raises(ValueError, match="--lr_scheduler, --fitting_mode, --distributed"):
            mammoth(*given)
    with pytest.raises(ham.InputError, match="--merge"):
        mammoth("--merge", "other")
    assert mammoth("--lr", "0.5").config.lr == 0.5 and mammoth().config.lr is None


def test_classes_not_seen_yet_are_never_told(mammoth, data):
    model = mammoth()
    model.means[0] = torch.ones(64)  # any other cosine, 0, could be higher
    logits = model(data.prepare(data.pixels["test"]))
    assert logits[:, 0].isfinite().all() and (logits[:, 1:] == -torch.inf).all()


# ------------------------------------------------------------------------------------------- PILOT


class BaseLearner:
    def __init__(self, args):
        self.args, self._device, self._cur_task = args, args["device"][0], -1
        self._known_classes = self._total_classes = 0


class SimpleVitNet(torch.nn.Module):
    """PILOT's network: cosines with the rows of `fc`, which grows."""

    def __init__(self, args, pretrained):
        super().__init__()
        self.backbone, self.fc = build_vit(), None

    def update_fc(self, n):
        old, self.fc = self.fc, torch.nn.Linear(64, n, bias=False)
        if old is not None:
            self.fc.weight.data[: len(old.weight)] = old.weight.data

    def forward(self, x):
        return ham.cosine_logits(self.backbone(x), self.fc.weight)


class PilotImages(Images):
    def __getitem__(self, i):
        return i, *super().__getitem__(i)[:2]


def test_pilot(data, expected, monkeypatch):
    names = {"models": module(), "models__base": module(BaseLearner=BaseLearner)}
    names |= {"utils": module(ham=ham), "utils__inc_net": module(SimpleVitNet=SimpleVitNet)}
    lifted, records = load("pilot", monkeypatch, **names), []

    def get_dataset(classes, source, mode):
        transform = {"train": flipped, "test": plain}[mode](data)
        images = PilotImages(data, source, classes, transform)
        images.labels = images.targets.numpy()
        return images

    manager = module(get_task_size=lambda task: len(TASKS[task]), get_dataset=get_dataset)
    monkeypatch.setattr(lifted, "DataLoader", lambda images, **_: DataLoader(images, 128))
    args = {"device": [torch.device("cpu")], "dataset": "cifar224", "model_name": "ham"}
    learner = lifted.Learner(args | {"seed": 3, "epochs": 2, "batch_size": 8, "rank": 2})
    assert learner.config == replace(CONFIG, device=learner.config.device)
    finish = learner.method.finish
    learner.method.finish = lambda *given: records.append(finish(*given)) or records[-1]
    for row in expected[1]:
        learner.incremental_train(manager)
        with torch.no_grad():
            logits = [(learner._network(x), y) for _, x, y in learner.test_loader]
        learner.after_task()
        assert ham.accuracies(*logits[0], TASKS[: len(row)]) == pytest.approx(row)
    same(records, expected[0])
    assert learner._known_classes == CLASSES
    assert not any(x.requires_grad for x in learner._network.backbone.parameters())


# --------------------------------------------------------------------------------------- Avalanche


class Pairs(Images):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], self.targets[i].item()


def test_avalanche(data, expected, monkeypatch):
    reason = "avalanche is not installed: pip install avalanche-lib wandb"
    pytest.importorskip("avalanche", reason=reason)
    from avalanche.benchmarks import nc_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    lifted = load("avalanche", monkeypatch)

    class Strategy(lifted.HAM):
        def make_train_dataloader(self, **_):
            sampler = Epochs(len(self.adapted_dataset), self.clock.train_exp_counter)
            self.dataloader = DataLoader(self.adapted_dataset, batch_sampler=sampler)

    transforms = {"train": (flipped(data), None), "eval": (plain(data), None)}
    sets = [Pairs(data, part, range(CLASSES), lambda x: x) for part in ("train", "test")]
    sets = [as_classification_dataset(images, transform_groups=transforms) for images in sets]
    order = {"n_experiences": 2, "task_labels": False, "fixed_class_order": [*range(CLASSES)]}
    benchmark = nc_benchmark(*sets, **order)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True))
    sizes = {"train_mb_size": 8, "eval_mb_size": 128, "train_epochs": 2}
    how = {"model": build_vit(), "num_classes": CLASSES, "config": CONFIG, "evaluator": evaluator}
    strategy = Strategy(**how, **sizes)
    for experience, row in zip(benchmark.train_stream, expected[1]):
        strategy.train(experience)
        found = strategy.eval(benchmark.test_stream[: len(row)])
        assert [100 * x for k, x in sorted(found.items()) if "Exp" in k] == pytest.approx(row)
    same(strategy.records, expected[0])


# ------------------------------------------------------------------------------------------- Sizes


def test_short_enough_to_be_read():
    for name, most in {"mammoth": 80, "pilot": 60, "avalanche": 60}.items():
        lines = (LIFT / f"{name}.py").read_text("utf-8").splitlines()
        assert len(lines) <= most and max(map(len, lines)) <= 100
