"""How the originals train, stated again: networks of PyTorch's libraries, losses, optimisers, schedules.

A network is small and random and has its tensors under the names that the original's checkpoints give them, so that
the tables of `cir_jax.conversion` carry weights and gradients over. A loss takes the network and a batch as ours read
it, with PyTorch's tensors; an optimiser is made, and its learning rates are set, as the original's code does.
"""

import functools
import itertools
import math
import re

import torch
from golden_maria import filled
from reference import library
from torch import nn
from torch.nn import functional as F


def drawn(network):
    """The network with random weights, large enough to matter; scalars keep their value."""
    state = network.state_dict()
    shapes = {n: x.shape for n, x in state.items() if x.is_floating_point() and x.ndim}
    made = {name: torch.from_numpy(x) for name, x in filled(shapes).items()}
    network.load_state_dict(state | made)
    return network.eval()


def pixels(images):
    """`[B, S, S, 3]` -> `[B, 3, S, S]`."""
    return images.permute(0, 3, 1, 2)


def unit(x):
    return F.normalize(x, dim=-1)


def diagonal(scores):
    """Cross-entropy of every row, whose right answer has its own number."""
    return F.cross_entropy(scores, torch.arange(len(scores)))


def both_ways(scores):
    return (diagonal(scores) + diagonal(scores.T)) / 2


# ---- CLIP ----


def clip(config):
    """open_clip's, in the sizes of a config, with the scale of the released ones: at its bound."""
    vision, text = config.vision, config.text
    made = library("open_clip").CLIP(
        config.embed,
        {
            "image_size": vision.size,
            "patch_size": vision.patch,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
        },
        {
            "context_length": text.length,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "layers": text.layers,
            "heads": text.heads,
        },
        quick_gelu=True,
        init_logit_scale=math.log(100),
    )
    return drawn(made)


def clip_loss(network, query, item):
    texts = unit(network.encode_text(query["text"].long()))
    images = unit(network.encode_image(pixels(item["image"])))
    return both_ways(network.logit_scale.exp() * texts @ images.T)


# ---- Candidate-Reranking ----


def vit(config):
    library("timm")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        config.size,
        config.patch,
        num_classes=0,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    ).requires_grad_(False)


def blip_text_config(config):
    library("transformers")
    from transformers.models.blip.configuration_blip import BlipTextConfig

    return BlipTextConfig(
        vocab_size=config.vocabulary,
        max_position_embeddings=config.length,
        hidden_size=config.width,
        encoder_hidden_size=config.image_width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        layer_norm_eps=config.epsilon,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,  # has cross-attention; it is not called as one
    )


def blip_text(config):
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    return BlipTextModel(blip_text_config(config), add_pooling_layer=False)


def stage1(config):
    """`BLIP_Retrieval`."""
    made = nn.Module()
    made.visual_encoder, made.text_encoder = vit(config.image), blip_text(config.text)
    made.vision_proj = nn.Linear(config.image.width, config.embed)
    made.text_proj = nn.Linear(config.text.width, config.embed)
    made.temp = nn.Parameter(torch.tensor(config.temperature))
    return drawn(made)


def encoded(query, vocabulary):
    """The ids with [ENC] in front."""
    ids = query["text"].long().clone()
    ids[:, 0] = vocabulary - 1
    return ids


def fused(text_encoder, ids, mask, tokens):
    """The state of a text that has looked at a picture."""
    return text_encoder(
        input_ids=ids,
        attention_mask=mask.long(),
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2]),
    ).last_hidden_state


def stage1_loss(network, query, item):
    """The picture side has no gradient: the optimiser skips it, `vision_proj` too."""
    with torch.no_grad():
        reference = network.visual_encoder.forward_features(pixels(query["image"]))
        target = network.visual_encoder.forward_features(pixels(item["image"]))
        items = unit(network.vision_proj(target[:, 0]))
    ids = encoded(query, network.text_encoder.config.vocab_size)
    states = fused(network.text_encoder, ids, query["text_mask"], reference)
    return diagonal(unit(network.text_proj(states[:, 0])) @ items.T / network.temp)


def stage2(config):
    """`BLIP_NLVR`, and as `stage1` the text encoder of stage I, which does not train."""
    made = nn.Module()
    made.visual_encoder, made.text_encoder = vit(config.image), nn.Module()
    plain = blip_text(config.text)
    made.text_encoder.embeddings, made.text_encoder.encoder = plain.embeddings, nn.Module()
    layers = (two_branches(config.text, n >= config.merge_from) for n in range(config.text.layers))
    made.text_encoder.encoder.layer = nn.ModuleList(layers)
    width = config.text.width
    made.cls_head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 2))
    made.stage1 = nn.Module()
    made.stage1.text_encoder = blip_text(config.text).requires_grad_(False)
    return drawn(made)


def two_branches(config, merges):
    """A layer of stage II: two of `transformers` that share their feed-forward half."""
    from transformers.models.blip import modeling_blip_text as blip

    config = blip_text_config(config)
    layer = nn.Module()
    layer.intermediate, layer.output = (
        blip.BlipTextIntermediate(config),
        blip.BlipTextOutput(config),
    )
    for name, looks in (("attention", False), ("crossattention", True)):
        both = nn.Module()
        both.output = nn.Module()
        for number, letter in ("0A", "1B"):
            one = blip.BlipTextAttention(config, looks)
            setattr(both, f"self{number}", one.self)
            setattr(both.output, f"dense{number}", one.output.dense)
            setattr(both.output, f"LayerNorm{letter}", one.output.LayerNorm)
        setattr(layer, name, both)
    if merges:
        width = config.hidden_size
        layer.crossattention.output.merge_layer = nn.Linear(2 * width, width)
    return layer


def branch(attention, number, letter):
    """(attention, its output layer, its norm) of one branch."""
    out = attention.output
    return (
        getattr(attention, f"self{number}"),
        *(getattr(out, n) for n in (f"dense{number}", f"LayerNorm{letter}")),
    )


def through(layer, states, mask, tokens):
    """Both states behind one layer."""
    read, looked = [], []
    for (number, letter), x in zip(("0A", "1B"), states):
        attend, dense, norm = branch(layer.attention, number, letter)
        read.append(norm(dense(attend(x, mask)[0]) + x))
        attend, dense, _ = branch(layer.crossattention, number, letter)
        looked.append(dense(attend(read[-1], encoder_hidden_states=tokens)[0]))
    out = layer.crossattention.output
    merges = hasattr(out, "merge_layer")
    seen = out.merge_layer(torch.cat(looked, -1)) if merges else (looked[0] + looked[1]) / 2
    both = [norm(seen + x) for norm, x in zip((out.LayerNormA, out.LayerNormB), read)]
    return [layer.output(layer.intermediate(x), x) for x in both]


def stage2_loss(network, query, item):
    """Every query with all targets of the batch, one query after the other."""
    encoder, first = network.text_encoder, network.stage1.text_encoder
    ids, mask = encoded(query, first.config.vocab_size), query["text_mask"]
    with torch.no_grad():
        reference = network.visual_encoder.forward_features(pixels(query["image"]))
        tokens = network.visual_encoder.forward_features(pixels(item["image"]))
        states = fused(first, ids, mask, reference)
    embedded = encoder.embeddings(ids)
    # original: 10,000 less for what is not to be seen
    unseen = (1 - mask.float())[:, None, None] * -10000.0
    rows = []
    for one, text, hidden in zip(states, embedded, unseen):
        both = [x.expand(len(tokens), -1, -1) for x in (one, text)]
        for layer in encoder.encoder.layer:
            both = through(layer, both, hidden, tokens)
        rows.append(network.cls_head(torch.cat([x[:, 0] for x in both], -1))[:, 0])
    return diagonal(torch.stack(rows))


# ---- CFIR ----


def beit3(config):
    """`BEiT3ForRetrieval` on torchscale's encoder."""
    library("torchscale")
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    made = nn.Module()
    made.beit3 = BEiT3(
        EncoderConfig(
            multiway=True,
            no_output_layer=True,
            vocab_size=config.vocabulary,
            img_size=config.size,
            patch_size=config.patch,
            max_source_positions=config.length + 2,
            encoder_embed_dim=config.width,
            encoder_ffn_embed_dim=config.hidden,
            encoder_layers=config.layers,
            encoder_attention_heads=config.heads,
        )
    )
    made.language_head = nn.Linear(config.width, config.width, bias=False)
    made.vision_head = nn.Linear(config.width, config.width, bias=False)
    made.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    return drawn(made)


def beit3_loss(network, query, item):
    ids, hidden = query["text"].long(), ~query["text_mask"]
    texts = network.beit3(textual_tokens=ids, text_padding_position=hidden)["encoder_out"]
    images = network.beit3(visual_tokens=pixels(item["image"]))["encoder_out"]
    texts, images = network.language_head(texts[:, 0]), network.vision_head(images[:, 0])
    return both_ways(network.logit_scale.exp() * unit(images) @ unit(texts).T)


# ---- Maria, Vokenization ----


def maria(config):
    """`JointModel`: BERT, a ResNeXt and a head behind each; `BEST.pth` names the heads' layers by the level."""
    transformers, torchvision = library("transformers"), library("torchvision")
    text, image = config.bert, config.resnext
    assert image.width == 64  # torchvision's stem has no other
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=text.vocabulary,
            max_position_embeddings=text.length,
            hidden_size=text.width,
            intermediate_size=text.hidden,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
        )
    )
    resnext = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        image.layers,
        groups=image.groups,
        width_per_group=image.group_width,
    )
    resnext.fc = nn.Identity()
    made = nn.Module()
    inputs = {"lang_model": config.text_layers * text.width, "visn_model": image.features}
    for name, backbone in (("lang_model", bert), ("visn_model", resnext)):
        part = nn.Module()
        part.backbone = backbone.requires_grad_(False)
        part.mlp = maria_head((inputs[name], *config.hidden, config.embed), config.level)
        setattr(made, name, part)
    return drawn(made)


def maria_head(sizes, level):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    if level == "token":
        return nn.Sequential(layers[0], nn.ReLU(), nn.Identity(), layers[1])
    whole = nn.Module()
    whole.linears = nn.ModuleList(layers)

    def forward(x):
        for layer in whole.linears[:-1]:
            x = F.relu(layer(x))
        return whole.linears[-1](x)

    whole.forward = forward
    return whole


def maria_vectors(network, query, item, text_layers):
    """Unit vectors `[B, L, D]` of all tokens, and `[B, D]` of the pictures."""
    text, image = network.lang_model, network.visn_model
    mask = query["text_mask"].long()
    states = text.backbone(query["text"].long(), mask, output_hidden_states=True).hidden_states
    texts = text.mlp(torch.cat(states[-text_layers:], -1))
    images = image.mlp(image.backbone(pixels(item["image"])))
    return [x / x.norm(2, dim=-1, keepdim=True) for x in (texts, images)]


def hinges(texts, images, margin):
    """`[B, …]`: every text against the picture of its partner in the other half of the batch."""
    (first, second), (own, other) = texts.chunk(2), images.chunk(2)
    inner = lambda x, y: (x * y).sum(-1)
    upper = F.relu(margin - inner(first, own) + inner(first, other))
    return torch.cat([upper, F.relu(margin - inner(second, other) + inner(second, own))])


def maria_loss(network, query, item, text_layers, parts, margin=0.5):
    """The mean over as many processes as `parts`, whose gradients are averaged."""
    texts, images = maria_vectors(network, query, item, text_layers)
    split = zip(texts[:, 0].chunk(parts), images.chunk(parts))
    return sum(hinges(text, image, margin).sum() for text, image in split) / parts


def vokenization_loss(network, query, item, text_layers, parts, margin=0.5):
    texts, images = maria_vectors(network, query, item, text_layers)
    split = zip(*(x.chunk(parts) for x in (texts, images[:, None], query["text_mask"].float())))
    each = ((hinges(text, image, margin) * mask).sum() / mask.sum() for text, image, mask in split)
    return sum(each) / parts


class BertAdamW(torch.optim.Optimizer):
    """`transformers.AdamW` of 2020, as the `bert` of both repositories: decay follows the update; the library dropped it."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._update(x, **{name: group[name] for name in self.defaults})

    def _update(self, x, lr, weight_decay, betas, eps):
        state = self.state[x] or {
            "n": 0,
            "first": torch.zeros_like(x),
            "second": torch.zeros_like(x),
        }
        state["n"] += 1
        state["first"].mul_(betas[0]).add_(x.grad, alpha=1 - betas[0])
        state["second"].mul_(betas[1]).addcmul_(x.grad, x.grad, value=1 - betas[1])
        self.state[x] = state
        size = lr * math.sqrt(1 - betas[1] ** state["n"]) / (1 - betas[0] ** state["n"])
        x.addcdiv_(state["first"], state["second"].sqrt().add_(eps), value=-size)
        x.add_(x, alpha=-lr * weight_decay)


# ---- optimisers: (optimizer, function that sets its rates before a step) of a network ----


def trained(network):
    return {name: x for name, x in network.named_parameters() if x.requires_grad}


def decayed_but(network, undecayed, weight_decay):
    """Two groups: what decays, and the parameters for which `undecayed(name, x)` is true."""
    groups = [{"params": [], "weight_decay": each} for each in (weight_decay, 0.0)]
    for name, x in trained(network).items():
        groups[undecayed(name, x)]["params"].append(x)
    return groups


def clip_optimizer(network, rate, weight_decay, warmup, steps):
    """open_clip's: gains, biases and the scale do not decay, and the scale is put back between its bounds."""
    library("open_clip_train")
    from open_clip_train.scheduler import cosine_lr

    parts = ("bn", "ln", "bias", "logit_scale")
    undecayed = lambda name, x: x.ndim < 2 or any(part in name for part in parts)
    groups = decayed_but(network, undecayed, weight_decay)
    made = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), eps=1e-6)
    scale = network.logit_scale.data
    made.register_step_post_hook(lambda *_: scale.clamp_(0, math.log(100)))
    return made, cosine_lr(made, rate, warmup, steps)


def reranking_optimizer(network, rate, weight_decay, epoch, period):
    """Candidate-Reranking's: one group; the rate of epoch n, of `epoch` steps, rises again behind the `period`."""
    made = torch.optim.AdamW(trained(network).values(), rate, weight_decay=weight_decay)

    def set_rates(step):
        cosine = math.cos(math.pi * (step // epoch) / period)
        made.param_groups[0]["lr"] = rate * 0.5 * (1 + cosine)

    return made, set_rates


def fti4cir_optimizer(network, rate, weight_decay, drop, factor=0.1):
    """FTI4CIR's: one group; from step `drop` on the rate is multiplied by the factor."""
    made = torch.optim.AdamW(trained(network).values(), rate, weight_decay=weight_decay)

    def set_rates(step):
        made.param_groups[0]["lr"] *= factor if step == drop else 1

    return made, set_rates


UNDECAYED = (
    "beit3.encoder.embed_positions.A.weight",
    "beit3.vision_embed.cls_token",
    "logit_scale",
)


def cfir_optimizer(network, rate, weight_decay, layers, layer_decay, warmup, steps, least):
    """CFIR's: groups by layer and decay (cfir.md 7.3), and a table of rates that is made once (7.4)."""
    groups = {}
    for name, x in trained(network).items():
        undecayed = x.ndim == 1 or name.endswith(".bias") or name in UNDECAYED
        inside = re.match(r"beit3\.encoder\.layers\.(\d+)\.", name)
        number = 0 if "embed" in name else int(inside[1]) + 1 if inside else layers + 1
        group = {"params": [], "weight_decay": 0.0 if undecayed else weight_decay}
        group["scale"] = layer_decay ** (layers + 1 - number)
        groups.setdefault((number, undecayed), group)["params"].append(x)
    made = torch.optim.AdamW(list(groups.values()), rate)
    table = cfir_rates(rate, least, warmup, steps)

    def set_rates(step):
        for group in made.param_groups:
            group["lr"] = table[step] * group["scale"]

    return made, set_rates


def cfir_rates(rate, least, warmup, steps):
    """The warm-up reaches both its ends, so that the first rate is 0 and the peak comes twice; the end is not reached."""
    behind = steps - warmup
    cosine = [0.5 * (1 + math.cos(math.pi * n / behind)) for n in range(behind)]
    return [rate * n / (warmup - 1) for n in range(warmup)] + [
        least + (rate - least) * x for x in cosine
    ]


def adam(network, rate):
    """What Maria and Vokenization published, `--optim adam`."""
    return torch.optim.Adam(trained(network).values(), rate), lambda step: None


def bert_adamw(network, rate, weight_decay, warmup, steps):
    """The default of both, `--optim bert`."""
    linear = library("transformers").get_linear_schedule_with_warmup
    undecayed = lambda name, x: "bias" in name or "LayerNorm.weight" in name
    made = BertAdamW(decayed_but(network, undecayed, weight_decay), rate, weight_decay)
    scheduler = linear(made, warmup, steps)
    return made, lambda step: scheduler.step() if step else None
