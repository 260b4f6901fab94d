"""Weight files against PyTorch itself: what it writes is read with the same names and the same values."""

import argparse
import importlib
import sys

import ml_dtypes
import numpy as np
import pytest
from reference import library

from cir_jax.conversion.sources import open_source

try:
    import torch
    from torch import nn
except ImportError:  # the tests are not selected then
    torch, nn = None, None

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")]

DTYPES = ["float64", "float32", "float16", "bfloat16", "bool", "complex64", "int64", "int32"]
DTYPES += ["int16", "int8", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(params=["torch zip", "torch legacy"])
def layout(request):
    return request.param


@pytest.fixture
def saved(tmp_path, layout):
    def saved(value, **options):
        path = tmp_path / "file"
        torch.save(value, path, _use_new_zipfile_serialization=layout == "torch zip", **options)
        source = open_source(path)
        assert source.layout == layout
        return source

    return saved


def values(tensor):
    """The values of a tensor as numpy has them."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return (
            tensor.view(torch.uint8 if tensor.ndim else torch.int16)
            .numpy()
            .view(ml_dtypes.bfloat16)
        )
    return tensor.numpy()


def same(source, state):
    assert list(source.tensors) == list(state)
    for key, tensor in state.items():
        found, expected = source.tensors[key], values(tensor)
        assert found.dtype == expected.dtype and found.shape == tuple(tensor.shape), key
        np.testing.assert_array_equal(found, expected.reshape(found.shape), key)


def drawn(dtype, *shape):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() * 50).to(
        getattr(torch, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_views(saved, dtype):
    whole = drawn(dtype, 6, 8)
    state = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[2:4, 1:7:2],
        "row": whole[3],
        "expanded": whole[0, :3].expand(4, 3),
        "permuted": drawn(dtype, 2, 3, 4).permute(2, 0, 1),
        "scalar": whole[1, 1],
        "single": drawn(dtype),
        "empty": drawn(dtype, 0, 4),
        "none": whole[2:2],
    }
    same(saved(state), state)


def test_parameters_and_what_is_not_weights(saved):
    linear = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    marked = nn.Parameter(torch.ones(2))
    marked.tag = "mine"
    state = {**linear.state_dict(), "p": nn.Parameter(torch.ones(3)), "marked": marked}
    source = saved(
        {
            "epoch": 3,
            "state_dict": state,
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, size=(2, 3), device=torch.device("cpu")),
            "best": np.float32(0.5),
            "shape": torch.Size([2]),
        }
    )
    same(source, state)
    assert source.left_out == {"optimizer": 6}
    arguments = {"lr": 0.1, "size": [2, 3], "device": "cpu"}
    assert source.facts == {"epoch": 3, "args": arguments, "best": 0.5, "shape": [2]}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(saved, protocol):
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    source = saved({"model": state, "a": 1.5, "n": np.float64(2)}, pickle_protocol=protocol)
    same(source, state)
    assert source.facts == {"a": 1.5, "n": 2.0}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_numpy(saved, protocol):
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.arange(6, dtype="i2").reshape(2, 3).T}
    arrays["big"] = np.arange(3, dtype=">f4")
    source = saved(arrays, pickle_protocol=protocol)
    for key, array in arrays.items():
        np.testing.assert_array_equal(source.tensors[key], array)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_and_other_tensors_are_refused_by_name(saved):
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    sparse = torch.eye(3).to_sparse()
    for tensor, name in ((quantized, "_rebuild_qtensor"), (sparse, "_rebuild_sparse_tensor")):
        with pytest.raises(ValueError, match=f"refused: the file wants torch._utils.{name}"):
            saved({"x": tensor})
    with pytest.raises(ValueError, match=r"wants torch\.nn\.modules\.conv\.Conv2d"):
        saved(nn.Conv2d(1, 1, 1))


def test_a_module_of_fti4cir(saved, monkeypatch, tmp_path):
    """A module whose class is defined in a file called `i2t_model`, as the published one is."""
    code = """
import torch
from torch import nn
class Phi(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 3))
class IMG2TEXT(nn.Module):
    def __init__(self):
        super().__init__()
        self.templates = nn.Parameter(torch.randn(1, 2, 3))
        self.phi_s, self.phi_a = Phi(), Phi()
        self.fc = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.LayerNorm(3))
        self.blocks = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)])
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("gone", torch.ones(2), persistent=False)
        self.register_parameter("none", None)
        self.loss, self.mse = nn.CosineEmbeddingLoss(), nn.MSELoss()
        self.activation = nn.functional.relu
        self.topk, self.epsilon = 12, 0.05
        self.criterion_target = torch.as_tensor([1])
"""
    (tmp_path / "i2t_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "i2t_model", raising=False)
    module = importlib.import_module("i2t_model").IMG2TEXT()
    source = saved(module)
    same(source, module.state_dict())
    assert (source.facts["topk"], source.facts["epsilon"]) == (12, 0.05)


def archived():
    """A module with what OpenAI's archives have: half weights, 0-d integers as buffers, nested modules."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 2, bias=False).half()
            self.blocks = nn.Sequential(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), nn.GELU())
            self.proj = nn.Parameter(torch.randn(4, 2).half())
            self.register_buffer("input_resolution", torch.tensor(224))
            self.norm = nn.BatchNorm2d(4)
            self.n = 7

        def forward(self, x):
            x = self.norm(nn.functional.conv2d(x, self.conv1.weight.float())).mean((2, 3))
            return self.blocks(x) @ self.proj.float() * self.n

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = Tower()
            self.logit_scale = nn.Parameter(torch.tensor(2.5))

        def forward(self, x):
            return self.visual(x) * self.logit_scale

    return Whole().eval()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path, how):
    module = archived()
    example = torch.ones(1, 3, 4, 4)
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, example)
    made.save(str(tmp_path / "file.pt"))
    source = open_source(tmp_path / "file.pt")
    assert source.layout == "torchscript"
    same(source, {key: made.state_dict()[key] for key in source.tensors})
    assert sorted(source.tensors) == sorted(module.state_dict())
    assert "visual.conv1.weight" in source.tensors


def test_files_of_safetensors(tmp_path):
    from safetensors.torch import save_file

    state = {dtype: drawn(dtype, 3, 4) for dtype in DTYPES}
    save_file(state, tmp_path / "file")
    source = open_source(tmp_path / "file")
    same(source, {key: state[key] for key in source.tensors})
    assert sorted(source.tensors) == sorted(state)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_folders_of_transformers(tmp_path, size):
    """One file, and shards with their index."""
    transformers = library("transformers")
    CLIPConfig, CLIPModel = transformers.CLIPConfig, transformers.CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    model = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 99},
            vision_config={**small, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )
    model.save_pretrained(tmp_path, max_shard_size=size)
    source = open_source(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or size == "1GB"
    assert source.layout == "hugging face folder" and source.config["model_type"] == "clip"
    state = model.state_dict()
    same(source, {key: state[key] for key in source.tensors})
    assert sorted(source.tensors) == sorted(state)


def test_a_file_without_checksums(saved, monkeypatch):
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
    state = {"x": torch.arange(6.0)}
    same(saved(state), state)
