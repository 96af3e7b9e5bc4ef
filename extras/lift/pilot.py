"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), as a model of PILOT (tried: 5240714).

    cp ham.py PILOT/utils/; cp extras/lift/pilot.py PILOT/models/ham.py
    utils/factory.py, before its "else": elif name == "ham": from models.ham import Learner
    python main.py --config=exps/ham.json

exps/ham.json is exps/simplecil.json with "model_name": "ham", "epochs": 5, "batch_size": 32, and
HAM's settings by name ("rank", "g_max", "lr", ...); its optimiser is not used. "device": [-1]: CPU.
Unlike in ham.py's own run: PILOT's augmentation; fp32 by default, "precision". The batches and,
with "shuffle", the class order are the same. Of several devices the first is used.
"""

import logging
from dataclasses import fields

import torch
from models.base import BaseLearner
from torch.utils.data import DataLoader
from utils import ham
from utils.inc_net import SimpleVitNet


class Learner(BaseLearner):
    """To ham.py this is the data, too: the "pixels" of an image are its row number in the task."""

    def __init__(self, args):
        super().__init__(args)
        self._network = SimpleVitNet(args, True).requires_grad_(False).eval().to(self._device)
        names = {f.name for f in fields(ham.Config)} & args.keys() - {"dataset", "device"}
        config = ham.Config(**{"precision": "fp32"} | {name: args[name] for name in names})
        self.config = ham.resolve(config)
        w0 = ham.lora_layers(self._network.backbone, self.config.layers)
        self.method = ham.HAM(w0, self.config)

    def images(self, part, classes):
        return torch.arange(len(self.plain)), torch.as_tensor(self.plain.labels)

    def prepare(self, rows, flip=None):
        images = self.plain if flip is None else self.augmented  # PILOT draws flips of its own
        return torch.stack([images[row][1] for row in rows.tolist()]).to(self._device)

    def incremental_train(self, manager):
        self._cur_task += 1
        self._total_classes += manager.get_task_size(self._cur_task)
        self._network.update_fc(self._total_classes)  # a row per class; logits are cosines
        vit, classes = self._network.backbone, range(self._known_classes, self._total_classes)
        self.plain = manager.get_dataset(classes, "train", "test")
        self.augmented = manager.get_dataset(classes, "train", "train")
        self.tasks = {self._cur_task: classes}
        trained, _ = ham.train_task(vit, self.method, self, self._cur_task)
        logging.getLogger("ham").info(self.method.finish(self._cur_task, trained))
        vit.load_state_dict(self.method.folded(), strict=False)
        images = ham.extract(vit, {}, self, "train", classes, self.config)
        self._network.fc.weight.data[list(classes)] = ham.class_means(*images, classes)
        test = manager.get_dataset(range(self._total_classes), "test", "test")
        self.test_loader = DataLoader(test, batch_size=128, num_workers=8)

    def after_task(self):
        self._known_classes = self._total_classes
