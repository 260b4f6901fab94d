"""What `python -m cir_jax.bench train` compares with: the same training step in PyTorch.

CLIP is that of `transformers`; BLIP's and BEiT-3's models, which have no fused attention there, are those of
`parts`. A method takes the config of ours, and a batch as ours reads it, and gives the loss.
"""

import contextlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from cir_jax.bench.peers import library, tensor
from cir_jax.bench.peers.parts import Bert, Tower, TwoBranchBert, Vit
from cir_jax.bench.shares import normed
from cir_jax.methods.blip_cir import BlipCirConfig
from cir_jax.methods.blip_rerank import BlipRerankConfig
from cir_jax.methods.cfir import CfirConfig
from cir_jax.methods.clip import ClipConfig

transformers = library("transformers")


def matched(scores):
    """Cross-entropy of each row's query, whose item stands in the same place."""
    return functional.cross_entropy(scores.float(), torch.arange(len(scores), device=scores.device))


def unit(x):
    return functional.normalize(x.float(), dim=-1)


class Clip(nn.Module):
    """CLIP; both towers and the loss are those of `transformers`."""

    def __init__(self, config):
        super().__init__()
        image, text = config.vision, config.text
        tower = lambda part: {
            "hidden_size": part.width,
            "intermediate_size": 4 * part.width,
            "num_hidden_layers": part.layers,
            "num_attention_heads": part.heads,
            "hidden_act": config.activation,
            "layer_norm_eps": config.epsilon,
        }
        vision = tower(image) | {"image_size": image.size, "patch_size": image.patch}
        last = text.vocabulary - 1
        words = {"vocab_size": text.vocabulary, "max_position_embeddings": text.length}
        words |= tower(text) | {"eos_token_id": last, "bos_token_id": last - 1, "pad_token_id": 0}
        sizes = {"text_config": words, "vision_config": vision, "projection_dim": config.embed}
        sizes = transformers.CLIPConfig(**sizes, attn_implementation="sdpa")
        self.model = transformers.CLIPModel(sizes)

    def forward(self, batch):
        ids, pixels = batch["query"]["text"], batch["item"]["image"]
        return self.model(input_ids=ids, pixel_values=pixels, return_loss=True).loss


def picture_encoder(config):
    """BLIP's ViT."""
    width = config.width
    return Vit(config.size, config.patch, width, config.layers, config.heads, 4 * width, 1e-6)


def with_encode_token(ids, config):
    return torch.cat([torch.full_like(ids[:, :1], config.vocabulary - 1), ids[:, 1:]], 1)


class BlipCir(nn.Module):
    """Candidate-Reranking, stage I."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image, self.text = picture_encoder(config.image), Bert(config.text)
        self.image_project = nn.Linear(config.image.width, config.embed)
        self.text_project = nn.Linear(config.text.width, config.embed)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def forward(self, batch):
        query, target = batch["query"], batch["item"]["image"]
        ids = with_encode_token(query["text"], self.config.text)
        fused = self.text(ids, query["text_mask"], self.image(query["image"]), first=True)
        queries = unit(self.text_project(fused[:, 0]))
        items = unit(self.image_project(self.image(target)[:, 0]))
        return matched(queries @ items.T / self.temperature)


class BlipRerank(nn.Module):
    """Candidate-Reranking, stage II: every query of the batch with every target."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.text.width
        self.image, self.fusion = picture_encoder(config.image), Bert(config.text)
        self.text = TwoBranchBert(config.text, config.merge_from)
        self.head = nn.ModuleDict({"up": nn.Linear(2 * width, width), "down": nn.Linear(width, 2)})

    def train(self, mode=True):
        super().train(mode)
        self.fusion.train(mode and self.config.fusion_dropout)
        return self

    def forward(self, batch):
        query, mask = batch["query"], batch["query"]["text_mask"]
        ids = with_encode_token(query["text"], self.config.text)
        tokens = self.image(batch["item"]["image"])
        parts = self.fusion(ids, mask, self.image(query["image"])), self.text.embeddings(ids), mask
        # Pictures lie outside, so that the keys and values of each are made once for all queries.
        rows = [x.repeat(len(tokens), *(1,) * (x.ndim - 1)) for x in parts]
        seen = functional.relu(self.head["up"](self.text(*rows, tokens)))
        return matched(self.head["down"](seen)[:, 0].reshape(len(tokens), -1).T)


class Cfir(nn.Module):
    """CFIR: the two experts of BEiT-3 as towers."""

    def __init__(self, config):
        super().__init__()
        size = config.encoder
        width, shape = size.width, (size.width, size.layers, size.heads, size.hidden)
        options = {"epsilon": 1e-5, "inner_norms": True, "unread": 2}
        self.image = Vit(size.size, size.patch, *shape, **options)
        self.text = Tower(size.length, *shape, **options)
        self.embedding = nn.Embedding(size.vocabulary, width)
        self.image_project = nn.Linear(width, width, bias=False)
        self.text_project = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch):
        query, mask = batch["query"], batch["query"]["text_mask"]
        words = self.text.placed(self.embedding(query["text"])) * mask[:, :, None]
        texts = self.text.run(words, mask[:, None, None], first=True)
        images = self.image(batch["item"]["image"], first=True)
        queries, items = (
            unit(self.text_project(texts[:, 0])),
            unit(self.image_project(images[:, 0])),
        )
        scores = self.logit_scale.exp() * queries @ items.T
        return (matched(scores) + matched(scores.T)) / 2


METHODS = {ClipConfig: Clip, BlipCirConfig: BlipCir, BlipRerankConfig: BlipRerank, CfirConfig: Cfir}

# What PyTorch's operators are, by a part of their names; what is not here is the rest.
OPERATORS = {
    "attention": re.compile("scaled_dot_product|flash_attention|efficient_attention"),
    "products": re.compile(
        r"^aten::(mm|addmm|bmm|baddbmm|mkldnn_convolution|_convolution|cudnn_conv)|mkl.*linear|convolution_backward"
    ),
    "optimizer": re.compile("_fused_adamw|_foreach|linalg_vector_norm"),
}


class Peer:
    """An experiment in PyTorch; `step` is one of training.

    Args:
      config: of our experiment: the method's sizes, AdamW with clipped gradients at a constant rate, what is frozen.
      batch: a tree of arrays as ours reads it.
      dtype: "bfloat16" computes under `torch.autocast`.
      device: "cpu" or "gpu".
      compiled: whether `torch.compile` makes model and loss; where it fails, they run as they are, and `title` says so.
    """

    def __init__(self, config, batch, *, dtype, device, compiled):
        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        torch.set_float32_matmul_precision("high")  # as JAX on a GPU
        torch.manual_seed(0)
        self.device, self.optim = {"gpu": "cuda"}.get(device, device), config.optim
        self.narrow = dtype == "bfloat16"
        self.model = METHODS[type(config.method)](config.method).to(self.device).train()
        for name, x in self.model.named_parameters():
            path = name.replace(".", "/")
            x.requires_grad_(not any(re.fullmatch(each, path) for each in self.optim.frozen))
        self.trained = [x for x in self.model.parameters() if x.requires_grad]
        groups = [
            {"params": [x for x in self.trained if (x.ndim >= 2) == decays], "weight_decay": decay}
            for decays, decay in ((True, self.optim.weight_decay), (False, 0.0))
        ]
        rest = {"lr": self.optim.lr, "betas": self.optim.betas, "fused": True}
        self.optimizer = torch.optim.AdamW(groups, **rest)
        self.batch = _on(batch, self.device)
        self.title, self.loss = "PyTorch, eager", self.model
        if compiled:
            self._compile()

    def _compile(self):
        self.title, self.loss = "PyTorch, compile", torch.compile(self.model)
        try:
            self._gradients()
        except Exception as error:  # whatever its compilers raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"torch.compile fails, eager instead: {reason}", file=sys.stderr)
            self.title, self.loss = "PyTorch, eager (compile fails)", self.model
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> int:
        """Numbers in the parameters."""
        return sum(x.numel() for x in self.model.parameters())

    def _gradients(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.narrow):
            loss = self.loss(self.batch)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Gradients, clipped, and AdamW; `value` is the loss before it."""
        self.value = self._gradients()
        nn.utils.clip_grad_norm_(self.trained, self.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes of a GPU at most."""
        return torch.cuda.max_memory_allocated()

    def shares(self) -> dict[str, float]:
        """Where the time of a step goes."""
        kinds = torch.profiler.ProfilerActivity
        activities, seconds = [kinds.CPU], Counter()
        activities += [kinds.CUDA] if self.device == "cuda" else []
        with _silent(), torch.profiler.profile(activities=activities) as profile:
            self.step()
            self.wait()
        for row in profile.key_averages():
            found = (kind for kind, names in OPERATORS.items() if names.search(row.key))
            spent = row.self_device_time_total if self.device == "cuda" else row.self_cpu_time_total
            seconds[next(found, "rest")] += spent
        return normed(seconds)

    @staticmethod
    def product(dtype, size: int) -> None:
        """A product of two square matrices on the CPU."""
        x = torch.ones((size, size), dtype=getattr(torch, dtype))
        torch.mm(x, x)


@contextlib.contextmanager
def _silent():
    """Nothing reaches stderr, where PyTorch's profiler reports that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _on(batch, device):
    if isinstance(batch, Mapping):
        return {name: _on(x, device) for name, x in batch.items()}
    return tensor(batch).to(device)
