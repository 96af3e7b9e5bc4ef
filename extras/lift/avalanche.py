"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), as a strategy of Avalanche (tried: 0.6.0).

    pip install avalanche-lib wandb timm; cp ham.py PROJECT/
    cp extras/lift/avalanche.py PROJECT/ham_strategy.py

HAM(model=vit, num_classes=100, config=ham.Config(), train_mb_size=32, train_epochs=5), a timm ViT
without head. Unlike in ham.py's own run: the benchmark's transforms and class order, Avalanche's
batches, fp32 unless Config(precision="bf16").
"""

from dataclasses import replace

import torch
from avalanche.training.templates import SupervisedTemplate
from torch.utils.data import DataLoader

import ham


class HAM(SupervisedTemplate):
    def __init__(self, *, model, num_classes, config, **kwargs):
        super().__init__(model=model, optimizer=None, **kwargs)
        self.config, self.records = replace(config, epochs=self.train_epochs), []
        model.requires_grad_(False).to(self.device)
        self.method = ham.HAM(ham.lora_layers(model, config.layers), self.config)
        self.class_rows = torch.zeros(num_classes, model.num_features, device=self.device)

    @torch.no_grad()
    def extract(self, weights, num_workers=0, **kwargs):
        """Features and labels of the experience's training images, transformed as test images."""
        images = self.experience.dataset.eval()
        batches = DataLoader(images, batch_size=128, num_workers=num_workers)
        x = [ham.forward(self.model, weights, x.to(self.device), self.config) for x, *_ in batches]
        return torch.cat(x), torch.tensor([*images.targets], device=self.device)

    def check_model_and_optimizer(self, **kwargs):
        self.model.eval()  # what an experience trains are no parameters of it
        self.classes = sorted(self.experience.classes_in_this_experience)
        self.trained, steps = self.method.start(), self.train_epochs * len(self.dataloader)
        x = self.extract(self.trained.weights(self.method.w0), **kwargs)
        self.optimizer, self.schedule = self.trained.begin(*x, self.classes, self.config, steps)

    def forward(self):
        weights, rows = {}, self.class_rows
        if self.is_training:
            weights = self.trained.weights(self.method.w0)
            rows = torch.zeros_like(rows).index_copy(0, self.trained.classes, self.trained.head)
        features = ham.forward(self.model, weights, self.mb_x, self.config)
        logits = ham.LOGIT_SCALE * ham.cosine_logits(features, rows)
        return logits.masked_fill(~rows.any(1), -torch.inf)  # not of this experience, not yet seen

    def optimizer_step(self):
        super().optimizer_step()
        self.schedule.step()

    def _after_training_exp(self, **kwargs):
        self.records.append(self.method.finish(len(self.records), self.trained))
        self.model.load_state_dict(self.method.folded(), strict=False)
        self.class_rows[self.classes] = ham.class_means(*self.extract({}, **kwargs), self.classes)
        super()._after_training_exp(**kwargs)
