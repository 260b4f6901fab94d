"""Transformers of PyTorch's own layers, with its fused attention: what `transformers` has without one, or not at all.

Names are those of `cir_jax.encoders`, so that a parity test can hand weights over. Masks are True where a token is
visible. Imported once PyTorch is known to be there.
"""

import torch
from torch import nn
from torch.nn import functional


def small(*shape):
    """A parameter with small random values."""
    return nn.Parameter(0.02 * torch.randn(shape))


class Attention(nn.Module):
    """Multi-head attention of x `[B, N, D]`, to itself or to `kv`; `norm` is the epsilon of an inner norm."""

    def __init__(self, width, heads, kv_width=None, norm=None, dropout=0.0):
        super().__init__()
        wide = kv_width or width
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(wide, width), nn.Linear(wide, width)
        self.ln = nn.Identity() if norm is None else nn.LayerNorm(width, eps=norm)
        self.out = nn.Linear(width, width)

    def forward(self, x, kv=None, mask=None):
        kv = x if kv is None else kv
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        heads = split(self.query(x)), split(self.key(kv)), split(self.value(kv))
        rate = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=rate)
        return self.out(self.ln(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them; `norm` as in `Attention`."""

    def __init__(self, width, hidden, norm=None):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ln = nn.Identity() if norm is None else nn.LayerNorm(hidden, eps=norm)

    def forward(self, x):
        return self.down(self.ln(functional.gelu(self.up(x))))


class Block(nn.Module):
    """A pre-norm block; `first` computes position 0 only."""

    def __init__(self, width, heads, hidden, epsilon, inner_norms):
        super().__init__()
        norm = epsilon if inner_norms else None
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, heads, norm=norm)
        self.mlp = Mlp(width, hidden, norm)

    def forward(self, x, mask=None, first=False):
        y = self.ln1(x)
        x = (
            x[:, :1] + self.attention(y[:, :1], y, mask)
            if first
            else x + self.attention(y, y, mask)
        )
        return x + self.mlp(self.ln2(x))


class Tower(nn.Module):
    """Blocks with positions in front and a norm behind.

    `inner_norms` are BEiT-3's, in front of both output layers of a block; `unread` its first rows of positions.
    """

    def __init__(
        self, positions, width, layers, heads, hidden, epsilon, inner_norms=False, unread=0
    ):
        super().__init__()
        self.unread = unread
        self.positions = small(unread + positions, width)
        make = lambda: Block(width, heads, hidden, epsilon, inner_norms)
        self.blocks = nn.ModuleList(make() for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, eps=epsilon)

    def placed(self, x):
        """x `[B, N, D]` with its positions added."""
        return x + self.positions[self.unread :][: x.shape[1]]

    def run(self, x, mask=None, first=False):
        """The last states, all of them or only that of position 0, `[B, 1, D]`."""
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.ln_post(self.blocks[-1](x, mask, first))


class Vit(Tower):
    """Pictures `[B, 3, S, S]` -> all tokens `[B, 1 + patches, D]`; with `first` `[B, 1, D]`."""

    def __init__(self, size, patch, width, layers, heads, hidden, epsilon, **options):
        tokens = (size // patch) ** 2 + 1
        super().__init__(tokens, width, layers, heads, hidden, epsilon, **options)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.class_token = small(width)

    def forward(self, images, first=False):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        return self.run(self.placed(x), first=first)


class Embeddings(nn.Module):
    """BERT's, without token types: ids `[B, L]` -> `[B, L, D]`."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = small(config.length, config.width)
        self.ln = nn.LayerNorm(config.width, eps=config.epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids):
        return self.dropout(self.ln(self.embedding(ids) + self.positions[: ids.shape[1]]))


class Branch(nn.Module):
    """The attention half of a layer of BLIP's text encoder: over the text, then over picture tokens."""

    def __init__(self, config):
        super().__init__()
        width, rate = config.width, config.dropout
        self.attention = Attention(width, config.heads, dropout=rate)
        self.cross = Attention(width, config.heads, config.image_width, dropout=rate)
        self.ln1, self.ln2 = (nn.LayerNorm(width, eps=config.epsilon) for _ in range(2))
        self.dropout = nn.Dropout(rate)

    def read(self, x, mask, first=False):
        y = x[:, :1] if first else x
        return self.ln1(self.dropout(self.attention(y, x, mask)) + y)

    def look(self, x, tokens):
        """Rows c * G … c * G + G - 1 of x `[C * G, N, D]` look at picture c, whose keys and values are made once."""
        return self.cross(x.reshape(len(tokens), -1, x.shape[-1]), tokens).reshape(x.shape)


class Layer(nn.Module):
    """One layer of BLIP's text encoder."""

    def __init__(self, config):
        super().__init__()
        self.branch = Branch(config)
        self.mlp, self.dropout = Mlp(config.width, config.hidden), nn.Dropout(config.dropout)
        self.ln3 = nn.LayerNorm(config.width, eps=config.epsilon)

    def forward(self, x, mask, tokens, first=False):
        x = self.branch.read(x, mask, first)
        x = self.branch.ln2(self.dropout(self.branch.look(x, tokens)) + x)
        return self.ln3(self.dropout(self.mlp(x)) + x)


class Bert(nn.Module):
    """BLIP's text encoder: ids and mask `[B, L]`, picture tokens `[B, M, W]` -> `[B, L, D]`, with `first` `[B, 1, D]`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, ids, mask, tokens, first=False):
        x = self.embeddings(ids)
        for block in self.blocks[:-1]:
            x = block(x, mask[:, None, None], tokens)
        return self.blocks[-1](x, mask[:, None, None], tokens, first)


class TwoBranchLayer(nn.Module):
    """Two states look at one picture and share what they saw: the mean, or with `merge` a linear map of both."""

    def __init__(self, config, merge):
        super().__init__()
        width = config.width
        self.fused, self.text = Branch(config), Branch(config)
        self.merge = nn.Linear(2 * width, width) if merge else None
        self.mlp, self.dropout = Mlp(width, config.hidden), nn.Dropout(config.dropout)
        self.ln3 = nn.LayerNorm(width, eps=config.epsilon)

    def forward(self, states, mask, tokens, first=False):
        branches = self.fused, self.text
        read = [branch.read(x, mask, first) for branch, x in zip(branches, states)]
        seen = [branch.look(x, tokens) for branch, x in zip(branches, read)]
        both = sum(seen) / 2 if self.merge is None else self.merge(torch.cat(seen, -1))
        both = self.dropout(both)
        x = torch.stack([branch.ln2(both + x) for branch, x in zip(branches, read)])
        return self.ln3(self.dropout(self.mlp(x)) + x).unbind()


class TwoBranchBert(nn.Module):
    """The text encoder of Candidate-Reranking's second stage; `[B, 2 * D]` of position 0 of both branches."""

    def __init__(self, config, merge_from):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = [TwoBranchLayer(config, n >= merge_from) for n in range(config.layers)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, fused, text, mask, tokens):
        states = fused, text
        for block in self.blocks:
            states = block(states, mask[:, None, None], tokens, first=block is self.blocks[-1])
        return torch.cat(states, -1)[:, 0]
