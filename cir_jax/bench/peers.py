"""What `python -m cir_jax.bench encode` compares with: the same encoders in PyTorch, with its fused attention.

The only file that knows PyTorch. CLIP and BERT are those of `transformers`, ResNeXt that of `torchvision`; what has no
fused attention there (BLIP's and BEiT-3's picture encoders) is built from PyTorch's own layers. Weights are random.
"""

import functools
import importlib

import numpy as np

INSTALL = "pip install 'cir_jax[bench]' torch==2.13.0"


def library(name: str):
    """`torch`, `transformers` or `torchvision`.

    Raises:
      ImportError: it is not installed, or does not fit the others.
    """
    try:
        _torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"bench compares with PyTorch, and {name} cannot be imported ({error}); {INSTALL}"
        ) from None


@functools.cache
def _torchvision():
    """What keeps torchvision importable; without it `transformers` breaks too.

    Its published wheel asks for two operators that the CPU build of torch lacks; there they are declared, and nothing
    calls them.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library


def clip_image():
    """CLIP ViT-B/32's picture tower: `[B, 3, 224, 224]` -> `[B, 512]`."""
    transformers = library("transformers")
    config = transformers.CLIPVisionConfig(patch_size=32, attn_implementation="sdpa")
    model = transformers.CLIPVisionModelWithProjection(config)
    return model, lambda batch: model(pixel_values=batch["image"]).image_embeds


def clip_text():
    """CLIP ViT-B/32's text tower: `[B, 77]` -> `[B, 512]`."""
    transformers = library("transformers")
    ends = {"eos_token_id": 49407, "bos_token_id": 49406}
    config = transformers.CLIPTextConfig(attn_implementation="sdpa", **ends)
    model = transformers.CLIPTextModelWithProjection(config)
    return model, lambda batch: model(input_ids=batch["text"]).text_embeds


def bert():
    """BERT base: `[B, L]` -> the last states `[B, L, 768]`."""
    transformers = library("transformers")
    config = transformers.BertConfig(attn_implementation="sdpa")
    model = transformers.BertModel(config, add_pooling_layer=False)
    call = lambda batch: model(input_ids=batch["text"], attention_mask=batch["text_mask"])
    return model, lambda batch: call(batch).last_hidden_state


def resnext():
    """ResNeXt-101 32x8d without its classes: `[B, 3, 224, 224]` -> `[B, 2048]`."""
    model = library("torchvision").models.resnext101_32x8d(weights=None)
    model.fc = library("torch").nn.Identity()
    return model, lambda batch: model(batch["image"])


def blip_image():
    """BLIP's ViT-B/16: `[B, 3, 224, 224]` -> all tokens `[B, 197, 768]`."""
    model = _vit(epsilon=1e-6, inner_norms=False)
    return model, lambda batch: model(batch["image"])


def beit3_image():
    """BEiT-3 base's picture expert: `[B, 3, 224, 224]` -> all tokens `[B, 197, 768]`."""
    model = _vit(epsilon=1e-5, inner_norms=True, unread=2)
    return model, lambda batch: model(batch["image"])


def _vit(epsilon: float, inner_norms: bool, unread: int = 0):
    """A pre-norm ViT-B/16.

    `inner_norms` are BEiT-3's, in front of both output layers of a block; `unread` its first rows of positions.
    """
    width, layers, patch = 768, 12, 16
    nn, functional = library("torch").nn, library("torch").nn.functional
    norm = lambda width: nn.LayerNorm(width, eps=epsilon)
    inner = norm if inner_norms else lambda width: nn.Identity()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Sequential(inner(width), nn.Linear(width, width))

        def forward(self, x):
            split = lambda y: y.unflatten(-1, (-1, 64)).transpose(1, 2)
            heads = split(self.query(x)), split(self.key(x)), split(self.value(x))
            mixed = functional.scaled_dot_product_attention(*heads)
            return self.out(mixed.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            wide = nn.Linear(width, 4 * width), nn.GELU(), inner(4 * width)
            self.attend = nn.Sequential(norm(width), Attention())
            self.feed = nn.Sequential(norm(width), *wide, nn.Linear(4 * width, width))

        def forward(self, x):
            x = x + self.attend(x)
            return x + self.feed(x)

    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut = nn.Conv2d(3, width, patch, patch)
            self.class_token = _small(1, 1, width)
            self.positions = _small(1, unread + (224 // patch) ** 2 + 1, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)), norm(width))

        def forward(self, images):
            x = self.cut(images).flatten(2).transpose(1, 2)
            x = library("torch").cat([self.class_token.expand(len(x), -1, -1), x], 1)
            return self.blocks(x + self.positions[:, unread:])

    return Vit()


def _small(*shape):
    torch = library("torch")
    return torch.nn.Parameter(0.02 * torch.randn(shape))


ENCODERS = {
    "clip-image": clip_image,
    "clip-text": clip_text,
    "blip-image": blip_image,
    "beit3-image": beit3_image,
    "bert": bert,
    "resnext": resnext,
}


class Peer:
    """An encoder of PyTorch with what is measured of it. Dropout and the learning of batch statistics are off."""

    def __init__(self, family: str, batch: dict[str, np.ndarray], threads: int, rate: float):
        torch = library("torch")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model, self.call = ENCODERS[family]()
        self.model.eval()
        self.batch = {name: _tensor(x) for name, x in batch.items()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)

    @property
    def parameters(self) -> int:
        """Numbers in the parameters and in the statistics of batch norms."""
        state = self.model.state_dict().values()
        return sum(x.numel() for x in state if x.is_floating_point())

    def forward(self) -> None:
        with library("torch").no_grad():
            self.call(self.batch)

    def train(self) -> None:
        """Gradients of all parameters and a step of plain SGD."""
        self.call(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _tensor(x: np.ndarray):
    torch = library("torch")
    if x.ndim == 4:  # PyTorch reads channels first
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return torch.from_numpy(x).long()
