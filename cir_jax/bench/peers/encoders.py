"""What `python -m cir_jax.bench encode` compares with: the same encoders in PyTorch, with its fused attention.

CLIP and BERT are those of `transformers`, ResNeXt that of `torchvision`; what has no
fused attention there (BLIP's and BEiT-3's picture encoders) is of `parts`. Weights are random.
"""

import numpy as np

from cir_jax.bench.peers import library, tensor


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
    model = _vit(epsilon=1e-6)
    return model, lambda batch: model(batch["image"])


def beit3_image():
    """BEiT-3 base's picture expert: `[B, 3, 224, 224]` -> all tokens `[B, 197, 768]`."""
    model = _vit(epsilon=1e-5, inner_norms=True, unread=2)
    return model, lambda batch: model(batch["image"])


def _vit(**options):
    """A ViT-B/16 for pictures of 224 pixels."""
    from cir_jax.bench.peers.parts import Vit

    return Vit(224, 16, 768, 12, 12, 3072, **options)


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
        self.batch = {name: tensor(x) for name, x in batch.items()}
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
