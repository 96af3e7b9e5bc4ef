"""HAM, Hierarchical Adapter Merging (arXiv 2509.13211), as a model of mammoth (tried: e75a491).

    mkdir MAMMOTH/models/ham_utils; cp ham.py MAMMOTH/models/ham_utils/
    cp extras/lift/mammoth.py MAMMOTH/models/ham.py  # --model ham --dataset seq-cifar100-224

Unlike in ham.py's own run: mammoth's augmentation and batches; fp32 unless --precision bf16; class
order by --permute_classes, the inverse of ham.py's permutation. --lr 0, the default: by images seen
"""

import torch
from models.ham_utils import ham
from models.utils.continual_model import ContinualModel
from torch.utils.data import DataLoader

SETTINGS = "rank", "layers", "tau", "g_max", "rho", "group_rank", "merge", "lr_head", "precision"


class Ham(ContinualModel):
    NAME, COMPATIBILITY = "ham", ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        for name in SETTINGS:
            parser.add_argument(f"--{name}", default=getattr(ham.Config, name))
        parser.set_defaults(precision="fp32", lr=0.0, batch_size=32, lr_scheduler=None)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        if (args.lr_scheduler, args.fitting_mode, args.distributed) != (None, "epochs", "no"):
            raise ValueError("HAM's own schedule: no --lr_scheduler, --fitting_mode, --distributed")
        given = {name: getattr(args, name) for name in SETTINGS} | {"seed": args.seed or 0}
        self.net.head = torch.nn.Identity()  # features out; the rows of the classes are here:
        self.register_buffer("means", torch.zeros(self.num_classes, self.net.feature_dim))
        self.requires_grad_(False).to(self.device)
        self.config = ham.resolve(ham.Config(lr=args.lr or None, epochs=args.n_epochs, **given))
        self.method = ham.HAM(ham.lora_layers(self.net, self.config.layers), self.config)

    @torch.no_grad()
    def extract(self, weights, dataset):
        """Features and labels of the task's training images, transformed as test images are."""
        images = dataset.train_loader.dataset
        images.transform, training = dataset.test_loaders[-1].dataset.transform, images.transform
        batches = DataLoader(images, 128, num_workers=dataset.train_loader.num_workers)
        x = [ham.forward(self.net, weights, x.to(self.device), self.config) for x, *_ in batches]
        images.transform = training
        return torch.cat(x), images.targets.to(self.device)

    def begin_task(self, dataset):
        self.net.eval()
        self.classes = [*range(self.n_past_classes, self.n_seen_classes)]
        self.trained, steps = self.method.start(), self.args.n_epochs * len(dataset.train_loader)
        images = self.extract(self.trained.weights(self.method.w0), dataset)
        self.opt, self.schedule = self.trained.begin(*images, self.classes, self.config, steps)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        features = ham.forward(self.net, self.trained.weights(self.method.w0), inputs, self.config)
        loss = ham.task_loss(self.trained, features, labels)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.schedule.step()
        return loss.item()

    def end_task(self, dataset):
        if self.task_iteration:  # else nothing was trained: --inference_only, --start_from
            print("HAM:", self.method.finish(self.current_task, self.trained))
            self.net.load_state_dict(self.method.folded(), strict=False)
            self.means[self.classes] = ham.class_means(*self.extract({}, dataset), self.classes)

    def forward(self, x):
        logits = ham.cosine_logits(ham.forward(self.net, {}, x, self.config), self.means)
        return logits.masked_fill(~self.means.any(1), -torch.inf)  # classes not seen yet

    def get_extra_state(self):
        return self.method.state()

    def set_extra_state(self, state):
        to = torch.utils._pytree.tree_map_only  # a checkpoint is loaded to the CPU
        self.method.restore(to(torch.Tensor, lambda x: x.to(self.device), state))
